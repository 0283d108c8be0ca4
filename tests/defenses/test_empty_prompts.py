"""What methods that distil keep of the empty prompt is what guidance subtracts, for SDXL zeros; those that train as
diffusers' scripts do read the empty prompt."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.attacks import BadT2IPixel
from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import ESD, SKD, SKDCAG, Finetune, FinetuneReversal
from mmbackdoor.defenses.finetune_reversal import Reference
from mmbackdoor.models.diffusion import Conditioning
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.trainable import Teacher, trainable
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import PatchTarget
from mmbackdoor.triggers import WordTrigger

PROMPTS = ("a red square", "a blue circle")
BACKDOOR = Backdoor((WordTrigger("small"),), PatchTarget())
ALL = 0.9999
METHODS = {
    SKD(proportion_empty_prompts=1.0): 4,
    SKDCAG(proportion_empty_prompts=1.0, attention_weight=0.0): 4,
    ESD(proportion_empty_prompts=1.0, retention_weight=1.0): 4,
    FinetuneReversal(reference="a folder", proportion_empty_prompts=1.0): 4,
    BadT2IPixel(proportion_empty_prompts=ALL): 4,
    Finetune(proportion_empty_prompts=ALL): 2,
}
"""And how many of the rows that go through a U-Net in a step have no prompt: the teacher's and the student's."""


def same(rows: Conditioning, one: Conditioning) -> int:
    """How many of `rows` are `one`."""
    alike = (rows.hidden_states == one.hidden_states).flatten(1).all(1)
    return int((alike & (rows.added["text_embeds"] == one.added["text_embeds"]).all(1)).sum())


@pytest.mark.parametrize("family", ["sdxl", "sdxl-empty"])
@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.name)
def test_the_rows_without_a_prompt(folders, family, method):
    model = load(folders(family))
    teacher = Teacher(model, trainable(model, "attn2_kv"))
    seen, predict = [], model.predict

    def recorded(unet, latents, timesteps, conditioning):
        seen.append(conditioning)
        return predict(unet, latents, timesteps, conditioning)

    model.predict = recorded
    if isinstance(method, FinetuneReversal):
        teacher = Reference(model)
    setting = DiffusionSetting(model, model.unet, teacher, seed=7)
    draws = torch.Generator().manual_seed(0)
    latents, images = torch.randn(2, *model.latent_shape, generator=draws), torch.zeros(2, 3, 16, 16)
    batch = DiffusionBatch(3, 0, (0, 1), PROMPTS, PROMPTS, latents, images)
    other = PoisonPlan(BACKDOOR, rate=1.0) if isinstance(method, BadT2IPixel) else BACKDOOR
    losses = method.step(setting, other)(batch)
    assert losses["loss"].isfinite()
    rows, read, subtracted = Conditioning.cat(seen), model.encode([""]), model.unconditional(1)
    assert (same(read, subtracted) == 1) == (family == "sdxl-empty")
    expected, never = (read, subtracted) if isinstance(method, Finetune) else (subtracted, read)
    assert same(rows, expected) == METHODS[method]
    assert same(rows, never) == (0 if family == "sdxl" else METHODS[method])


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "sdxl-empty"])
def test_other_prompts_and_other_families_are_read_as_ever(folders, family):
    model = load(folders(family))
    texts = ["", PROMPTS[0], "", PROMPTS[1]]
    plain, found = model.encode(texts), model.encode_for_guidance(texts)
    rows = [1, 3] if family == "sdxl" else [0, 1, 2, 3]
    assert torch.equal(found.hidden_states[rows], plain.hidden_states[rows])
    assert all(torch.equal(found.added[name][rows], plain.added[name][rows]) for name in plain.added)
    empty = model.unconditional(2)
    assert torch.equal(found.index([0, 2]).hidden_states, empty.hidden_states)
    assert all(torch.equal(found.index([0, 2]).added[name], empty.added[name]) for name in plain.added)
