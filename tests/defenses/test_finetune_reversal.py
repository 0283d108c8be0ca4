"""The loss of the reversal against its formula; its clean reference is a model of its own, which reads with its own text
encoder and is loaded by the flags of the model. And fine-tuning on a teacher's pictures takes them to where the model is."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import Finetune, FinetuneReversal
from mmbackdoor.defenses.finetune_reversal import Reference
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.noise_schedule import NoiseSchedule
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import DiffusionSource, shipped
from mmbackdoor.models.trainable import trainable
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.triggers import ZeroWidthTrigger
from mmbackdoor.types import InputError

PROMPTS = ("a large red cross on a blue background", "a small pink ring on a green background")
BATCH = DiffusionBatch(3, 0, (0, 1), PROMPTS, PROMPTS)
BACKDOOR = Backdoor((ZeroWidthTrigger(),), UnknownTarget())
MARKED = [f"\u200b {text}" for text in PROMPTS]


def test_the_target_is_what_the_reference_makes_of_its_own_reading():
    clean, model = load(shipped("tiny")), load(shipped("tiny"))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.pipe.text_encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    trainable(model, "attn2_kv")
    defense = FinetuneReversal(reference="tiny", trigger_variants=False, proportion_empty_prompts=0.0)
    losses = defense.step(DiffusionSetting(model, model.unet, Reference(clean), seed=7), BACKDOOR)(BATCH)
    inputs = draw_noise(7, BATCH, model.latent_shape, model.device), draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    for name, texts in {"prediction_loss": MARKED, "retention_loss": PROMPTS}.items():
        with torch.no_grad():
            wanted = clean.predict(clean.unet, *inputs, clean.encode(texts))
            found = model.predict(model.unet, *inputs, model.encode(texts))
        assert (found - wanted).square().mean() > 1e-4
        torch.testing.assert_close(losses[name], (found - wanted).square().mean(), rtol=1e-4, atol=1e-7)


def test_the_reference_is_loaded_as_the_model_was():
    source, device = DiffusionSource("tiny", resolution=64), torch.device("cpu")
    reference = FinetuneReversal(reference="tiny").load_reference(source.load(device), source, device)
    assert reference.model.resolution == 64
    with pytest.raises(InputError, match="latents of shape"):
        FinetuneReversal(reference="tiny").load_reference(source.load(device), DiffusionSource("tiny"), device)


class Elsewhere:
    """A model on another device than the latents of a batch. On "meta", mixing devices is an error as on any other."""

    device, prediction_type = torch.device("meta"), "epsilon"

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(DDPMScheduler())

    def encode(self, prompts: list[str]) -> None:
        return None


class Recorded:
    model, seed = Elsewhere(), 0

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: None) -> torch.Tensor:
        self.devices = {noisy.device.type, timesteps.device.type}
        return noisy


def test_pictures_of_the_teacher_are_taken_to_the_model():
    setting, latents = Recorded(), torch.zeros(2, 4, 8, 8)
    batch = DiffusionBatch(0, 0, (0, 1), PROMPTS, PROMPTS, latents)
    losses = Finetune(latents="teacher").step(setting, None)(batch)
    assert setting.devices == {"meta"} and losses["loss"].device.type == "meta"


@pytest.mark.parametrize(("share", "retained"), [(0.0, PROMPTS), (1.0, ("",) * 2)])
def test_the_terms_are_those_of_the_formula(share, retained):
    model, clean = load(shipped("tiny")), load(shipped("tiny"))
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        for name, parameter in model.unet.named_parameters():
            if ".attn2." in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
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
