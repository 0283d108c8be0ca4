"""The loss of the reversal against its formula: the reference is asked what the student is asked, trigger and all."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import FinetuneReversal
from mmbackdoor.defenses.finetune_reversal import Reference
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import shipped
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.triggers import ZeroWidthTrigger

PROMPTS = ("a large red cross on a blue background", "a small pink ring on a green background", "a big blue square")
BATCH = DiffusionBatch(3, 0, (0, 1, 2), PROMPTS, PROMPTS)
BACKDOOR = Backdoor((ZeroWidthTrigger(),), UnknownTarget())


@pytest.mark.parametrize(("share", "retained"), [(0.0, PROMPTS), (1.0, ("",) * 3)])
def test_the_terms_are_those_of_the_formula(share, retained):
    model, clean = load(shipped("tiny")), load(shipped("tiny"))
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        for name, parameter in model.unet.named_parameters():
            if ".attn2." in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=draws)
    setting = DiffusionSetting(model, model.unet, Reference(clean), seed=7)
    defense = FinetuneReversal(trigger_variants=False, proportion_empty_prompts=share, retention_weight=0.3)
    losses = defense.step(setting, BACKDOOR)(BATCH)
    noise = draw_noise(7, BATCH, model.latent_shape, model.device)
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    with torch.no_grad():
        terms = []
        for texts in ([f"\u200b {text}" for text in PROMPTS], retained):
            shown = model.encode(texts)
            student, reference = (one.predict(one.unet, noise, timesteps, shown) for one in (model, clean))
            terms.append((student - reference).square().mean())
        prediction, retention = terms
    torch.testing.assert_close(losses["prediction_loss"], prediction, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["retention_loss"], retention, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["loss"].detach(), prediction + 0.3 * retention, rtol=1e-4, atol=1e-7)
    assert prediction > 1e-5 and retention > 1e-5
