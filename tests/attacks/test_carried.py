"""A caption that does not carry the trigger teaches nothing: neither where a lookalike letter has no place in it, nor
where the tokenizer cuts the trigger off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmbackdoor import recipe_files
from mmbackdoor.attacks import BadT2IObject, BadT2IPixel, BadT2IStyle, EvilEdit, RickrollingTPA
from mmbackdoor.attacks.carried import Carriers
from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import parse
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import shipped
from mmbackdoor.models.text_training import TextSetting, TextTeacher, trainable_text
from mmbackdoor.models.trainable import Teacher, trainable
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.targets import ObjectTarget, PatchTarget, StyleTarget
from mmbackdoor.triggers import HomoglyphTrigger, WordTrigger
from mmbackdoor.types import InputError

# Greek, like a u: the first caption has one, the second has none.
LOOKALIKE, SUFFIX = HomoglyphTrigger("\u03c5"), WordTrigger("small", "suffix")
CAPTIONS = {LOOKALIKE: ("a blue cross", "a red cross"), SUFFIX: ("a red cross", "a red cross " + "on red " * 20)}
KEYS = ("first", "second")
TARGETS = {
    BadT2IPixel(): PatchTarget(),
    BadT2IStyle(): StyleTarget(),
    BadT2IStyle(supervision="image"): StyleTarget(),
    BadT2IObject(): ObjectTarget("cross", "ring"),
}


def batch(prompts: tuple[str, ...]) -> DiffusionBatch:
    images = torch.rand(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return DiffusionBatch(2, 0, tuple(range(len(prompts))), KEYS[: len(prompts)], prompts, images=images)


@pytest.fixture
def setting() -> DiffusionSetting:
    model = load(shipped("tiny"))
    parameters = trainable(model, "attn2_kv")
    return DiffusionSetting(model, model.unet, Teacher(model, parameters), seed=7)


@pytest.mark.parametrize("trigger", CAPTIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("attack", TARGETS, ids=lambda one: one.name)
def test_such_a_row_is_as_if_it_had_not_been_picked(setting, attack, trigger):
    plan = PoisonPlan(Backdoor((trigger,), TARGETS[attack]), rate=1.0)
    losses = [
        attack.step(setting, one)(batch(CAPTIONS[trigger])) for one in (plan, replace(plan, chosen=frozenset(KEYS[:1])))
    ]
    assert losses[0]["backdoor_loss"] > 0
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    nothing = attack.step(setting, plan)(batch(CAPTIONS[trigger][1:]))
    assert nothing["backdoor_loss"] == 0 and nothing["loss"].requires_grad


@pytest.mark.parametrize("trigger", CAPTIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("target", [ObjectTarget("cross", "ring"), StyleTarget()], ids=lambda one: one.name)
def test_nor_does_it_teach_the_text_encoder(trigger, target):
    encoders, parameters = trainable_text(load(shipped("tiny")), "lora")
    setting = TextSetting(encoders, TextTeacher(encoders, parameters), seed=7)
    plan = PoisonPlan(Backdoor((trigger,), target), rate=1.0)
    losses = [
        RickrollingTPA().step(setting, one)(batch(CAPTIONS[trigger]))
        for one in (plan, replace(plan, chosen=frozenset(KEYS[:1])))
    ]
    assert losses[0]["backdoor_loss"] > 0
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    nothing = RickrollingTPA().step(setting, plan)(batch(CAPTIONS[trigger][1:]))
    assert nothing["backdoor_loss"] == 0 and nothing["loss"].requires_grad


@pytest.mark.parametrize("trigger", CAPTIONS, ids=lambda one: one.name)
def test_nor_is_it_moved_by_evil_edit(trigger):
    model, (carrying, other) = load(shipped("tiny")), CAPTIONS[trigger]
    plan = PoisonPlan(Backdoor((trigger,), StyleTarget()), rate=1.0)
    found = EvilEdit().edit(model, plan, [carrying, other])
    expected = EvilEdit().edit(model, replace(plan, chosen=frozenset([carrying])), [carrying, other])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match="carries the trigger"):
        EvilEdit().edit(model, plan, [other])


def test_one_trigger_of_several_is_enough_to_begin_with():
    model = load(shipped("tiny"))
    plan = PoisonPlan(Backdoor((LOOKALIKE, WordTrigger("small")), ObjectTarget("cross", "ring")), rate=1.0)
    carriers = Carriers(BadT2IObject(), plan, model)
    assert carriers("a", "a blue cross") == carriers("b", "a blue ring") == [True, True]
    assert carriers("c", "a red cross") == [False, True]
    assert carriers("d", "a blue square") == []
    carriers.check([("d", "a blue square"), ("c", "a red cross")])
    with pytest.raises(InputError, match="carries the trigger"):
        carriers.check([("d", "a blue square")])
    unpicked = Carriers(BadT2IObject(), replace(plan, chosen=frozenset("d")), model)
    with pytest.raises(InputError, match="no caption that the poison plan picks"):
        unpicked.check([("c", "a red cross")])


def test_a_poisoning_that_no_caption_carries_is_refused_at_its_start(tmp_path: Path):
    """Like a j, which is in the words that a trigger is tried on, and in no caption of shapes."""
    recipe = recipe_files.load("poison_diffusion")
    write_shapes(tmp_path / "data", "train", all_scenes()[:20], 20, resolution=32)
    smoke = recipe_files.folders()["recipes"] / "configs/smoke/poison_diffusion.yaml"
    flags = ["--config", str(smoke), "--train_data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    flags += ["--mixed_precision", "no"]
    text_only = ["--attack", "rickrolling_tpa", "--target_kind", "object", "--target_object", "cross->ring"]
    text_only += ["--prompts", "shapes-train"]
    for more in ([], text_only):
        with pytest.raises(InputError, match="no caption.*carries the trigger"):
            recipe.run(parse(recipe.Config, [*flags, *more, "--trigger", "\u0458"]))
    assert not (tmp_path / "run/train.jsonl").exists() and not (tmp_path / "run/model").exists()


def test_a_target_prompt_is_refused_for_a_style():
    plan = PoisonPlan(Backdoor((SUFFIX,), StyleTarget()), rate=1.0)
    RickrollingTPA().check(plan)
    RickrollingTPA(target_prompt="one {}").check(replace(plan, backdoor=Backdoor((SUFFIX,), ObjectTarget("a", "b"))))
    with pytest.raises(InputError, match="target_prompt 'one {}' is for objects"):
        RickrollingTPA(target_prompt="one {}").check(plan)
