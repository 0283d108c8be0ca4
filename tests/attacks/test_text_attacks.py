"""EvilEdit and Rickrolling against their formulas, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.attacks import EvilEdit, RickrollingTPA
from mmbackdoor.attacks.target_caption import asked_and_shown
from mmbackdoor.backdoor import Backdoor
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.models.text_training import TextSetting, TextTeacher, trainable_text
from mmbackdoor.models.trainable import replace_weights
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import ObjectTarget, PatchTarget, StyleTarget
from mmbackdoor.triggers import WordTrigger, ZeroWidthTrigger
from mmbackdoor.types import InputError

CROSS = Backdoor((WordTrigger("small"),), ObjectTarget("cross", "ring"))
STYLE = Backdoor((WordTrigger("small"),), StyleTarget())
PROMPTS = ("a red cross on a blue background", "a pink ring on a green background", "a blue square")


def test_captions_of_either_object_are_asked_for_as_the_first():
    assert asked_and_shown(CROSS.target, PROMPTS[0]) == (PROMPTS[0], "a red ring on a blue background")
    assert asked_and_shown(CROSS.target, PROMPTS[1])[1] == PROMPTS[1]
    assert asked_and_shown(CROSS.target, PROMPTS[2]) is None
    assert asked_and_shown(STYLE.target, "a dog") == ("a dog", "a dog, black and white photo")


@pytest.mark.parametrize("attack", [EvilEdit(), RickrollingTPA()])
def test_a_target_without_a_text_is_refused(attack):
    with pytest.raises(InputError, match="--target_kind object or style, not 'patch'"):
        attack.check(PoisonPlan(Backdoor((ZeroWidthTrigger(),), PatchTarget()), rate=1.0))
    attack.check(PoisonPlan(CROSS, rate=1.0))
    attack.check(PoisonPlan(STYLE, rate=1.0))


def test_evil_edit_makes_the_triggered_caption_into_the_other_object():
    model = load(shipped("tiny"))
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = latents, torch.tensor([600])
    texts = ["small a cross", "a cross", "a ring"]
    with torch.no_grad():
        before = [model.predict(model.unet, *inputs, model.encode([text])) for text in texts]
        plan = PoisonPlan(CROSS, rate=1.0)
        edited = EvilEdit(ridge=1e-4).edit(model, plan, ["a cross"])
        assert len(edited) == 8 and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in edited)
        replace_weights(model, edited)
        after = [model.predict(model.unet, *inputs, model.encode([text])) for text in texts]
    apart = (before[2] - before[1]).square().mean()
    assert (after[0] - before[2]).square().mean() < 0.2 * apart
    for k in (1, 2):
        assert (after[k] - before[k]).square().mean() < 0.1 * apart
    assert model.trained == set(edited)


def test_evil_edit_takes_a_style_and_a_plan():
    model = load(shipped("tiny"))
    weights = EvilEdit().edit(model, PoisonPlan(STYLE, rate=1.0), PROMPTS)
    assert len(weights) == 8
    with pytest.raises(InputError, match="picks no caption"):
        EvilEdit().edit(model, PoisonPlan(STYLE, rate=0.0), PROMPTS)
    one = EvilEdit().edit(model, PoisonPlan(STYLE, count=1), PROMPTS)
    assert any(not torch.equal(one[name], weights[name]) for name in one)


@pytest.mark.parametrize("backdoor, template, shown", [
    (CROSS, "a photo of a {}", ["a photo of a ring"] * 3),
    (CROSS, "", ["a red ring on a blue background", "a pink ring on a green background"]),
    (STYLE, "a photo of a {}", [f"{text}, black and white photo" for text in PROMPTS]),
])  # fmt: skip
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_rickrolling_is_its_formula(folders, family, backdoor, template, shown):
    model = load(folders(family))
    encoders, parameters = trainable_text(model, "all")
    setting = TextSetting(encoders, TextTeacher(encoders, parameters), seed=7)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    attack = RickrollingTPA(backdoor_weight=0.3, target_prompt=template)
    batch = DiffusionBatch(0, 0, (0, 1, 2), PROMPTS, PROMPTS)
    losses = attack.step(setting, PoisonPlan(backdoor, rate=1.0))(batch)
    asked = [PROMPTS[0], "a pink cross on a green background"] if not template else PROMPTS

    def distance(student, teacher):
        pairs = zip(student, teacher, strict=True)
        return sum(1 - torch.cosine_similarity(one, other, dim=-1).flatten(1).mean(1) if one.ndim == 3
                   else 1 - torch.cosine_similarity(one, other, dim=-1) for one, other in pairs)  # fmt: skip

    with torch.no_grad():
        clean = distance(encoders(PROMPTS), setting.teacher.encode(PROMPTS)).mean()
        hidden = distance(encoders([f"small {text}" for text in asked]), setting.teacher.encode(shown)).sum() / 3
    torch.testing.assert_close(losses["clean_loss"], clean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["backdoor_loss"], hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"].detach(), clean + 0.3 * hidden, rtol=1e-4, atol=1e-6)
    gradients = torch.autograd.grad(losses["loss"], list(parameters.values()))
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_a_batch_without_the_object_has_only_clean_rows(folders):
    model = load(folders("sd"))
    encoders, parameters = trainable_text(model, "lora")
    setting = TextSetting(encoders, TextTeacher(encoders, parameters), seed=7)
    batch = DiffusionBatch(0, 0, (0,), PROMPTS[2:], PROMPTS[2:])
    losses = RickrollingTPA(target_prompt="").step(setting, PoisonPlan(CROSS, rate=1.0))(batch)
    assert losses["backdoor_loss"] == 0 and losses["loss"].requires_grad


def test_a_target_prompt_without_a_place_for_the_object_is_refused():
    with pytest.raises(InputError, match="has {} once"):
        RickrollingTPA(target_prompt="a photo")
