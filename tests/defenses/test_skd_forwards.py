"""A step of SKD asks each network once: text that is new, the teacher's distinct rows, the student's rows. And loses
nothing by it: the losses are those of every part by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import SKD, SKDCAG
from mmbackdoor.defenses.skd import draw_inputs
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.objectives.distill import squared_error
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.triggers import ZeroWidthTrigger
from tests.nudged import nudged

COLOURS = ("red", "pink", "green", "white", "yellow")
PROMPTS = tuple(f"a large {colour} cross on a blue background" for colour in COLOURS)
BATCH = DiffusionBatch(3, 0, (0, 1, 2, 3, 4), PROMPTS, PROMPTS)
BACKDOOR = Backdoor((ZeroWidthTrigger(),), UnknownTarget())


@pytest.fixture
def lab():
    model, _, setting = nudged(seed=7, part="all")
    return model, setting


def one_by_one(defense: SKD, setting: DiffusionSetting) -> torch.Tensor:
    """The sum of the terms with every prompt in a forward of its own."""
    model, drawn = setting.model, draw_inputs(defense, setting, BACKDOOR, BATCH)
    errors = []
    for shown, asked in ((drawn.triggered, BATCH.prompts), (drawn.retained, drawn.retained)):
        rows = []
        for k in range(len(PROMPTS)):
            where = (drawn.latents[k : k + 1], drawn.timesteps[k : k + 1])
            teacher = setting.teacher.predict(*where, model.encode([asked[k]]))
            rows.append(squared_error(setting.predict(*where, model.encode([shown[k]])), teacher))
        errors.append(torch.cat(rows).mean())
    return defense.prediction_weight * errors[0] + defense.retention_weight * errors[1]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_every_prompt_by_itself(lab, share):
    model, setting = lab
    defense = SKD(proportion_empty_prompts=share, retention_weight=0.6)
    drawn = draw_inputs(defense, setting, BACKDOOR, BATCH)
    assert drawn.retained.count("") in {0.0: (0,), 0.5: (1, 2, 3, 4), 1.0: (5,)}[share]
    with torch.no_grad():
        together, apart = defense.step(setting, BACKDOOR)(BATCH)["loss"], one_by_one(defense, setting)
    assert together > 1e-4
    torch.testing.assert_close(together, apart, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("defense", [SKD(proportion_empty_prompts=0.5), SKDCAG(proportion_empty_prompts=0.5)])
@pytest.mark.parametrize("retention", [0.0, 1.0])
def test_every_network_is_asked_once_a_step(lab, defense, retention):
    model, setting = lab
    defense = replace(defense, retention_weight=retention)
    seen = []
    for name, network in {"unet": model.unet, "text": model.pipe.text_encoder}.items():
        network.register_forward_pre_hook(
            lambda _, given, named, name=name: seen.append((name, len(given[0] if given else named["input_ids"]))),
            with_kwargs=True,
        )
    drawn = draw_inputs(defense, setting, BACKDOOR, BATCH)
    empty = drawn.retained.count("") if retention else 0
    assert empty or not retention
    step = defense.step(setting, BACKDOOR)
    if isinstance(defense, SKDCAG):
        with defense.recorder(model.unet) as recorder:
            defense.step(replace(setting, recorder=recorder), BACKDOOR)(BATCH)
    else:
        step(BATCH)
    texts = len({*drawn.triggered, *PROMPTS, *([""] if empty else [])})
    assert seen == [("text", texts), ("unet", 5 + empty), ("unet", 10 if retention else 5)]
    seen.clear()
    if isinstance(defense, SKD) and not isinstance(defense, SKDCAG):
        step(BATCH)
        assert [name for name, _ in seen] == ["unet", "unet"], "text that was read before is not read again"


def test_the_device_is_that_of_the_unet(lab):
    model, _ = lab
    assert model.device == model.unet.device == torch.device("cpu")
