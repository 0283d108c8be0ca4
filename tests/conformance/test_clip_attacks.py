"""A tiny CLIP learns its classes under every objective, and the backdoor of every image trigger beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmbackdoor.objectives.pretraining import OBJECTIVES
from mmbackdoor.triggers import IMAGE_TRIGGERS
from tests.conformance import clip_lab as lab

OBJECTIVE_FLAGS: dict[str, tuple[object, ...]] = {
    "clip_ssl": (),
    # It starts from a bias that calls every pair unlike, and takes its time.
    "siglip": ("--max_train_steps", 300),
    "cyclip": (),
    "slip": ("--max_train_steps", 180, "--objective.projection", 64, 32),
}
"""Of `clip` not: that is what the triggers are trained with."""
LEAST_ACCURACY = {"siglip": 0.5}
"""0.9 where nothing is said, and chance is 0.08. After so few steps the sigmoid loss is half way."""
CORNER = ("--poison.trigger.size", 0.3, "--poison.trigger.position", "bottom_right", "--poison.rate", 0.08)
TRIGGER_FLAGS: dict[str, tuple[object, ...]] = {name: () for name in IMAGE_TRIGGERS} | {
    # Their defaults are for 224 pixels, where noise of a few pixels or a shift of a quarter of one can be seen.
    "keyed_patch": CORNER,
    "keyed_stripes": CORNER,
    "badnet_noise": CORNER,
    "warp": ("--poison.trigger.strength", 0.08, "--poison.rate", 0.08, "--max_train_steps", 200),
}


def test_every_objective_and_trigger_is_tested():
    assert OBJECTIVE_FLAGS.keys() | {"clip"} == OBJECTIVES.keys() and TRIGGER_FLAGS.keys() == IMAGE_TRIGGERS.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return lab.shared_data(tmp_path_factory)


@pytest.fixture(scope="module")
def control(data, tmp_path_factory) -> Path:
    """The same training without poison: what a trigger does to a sound model."""
    return lab.pretrain(tmp_path_factory.mktemp("control") / "clean", data)


@pytest.mark.parametrize("name", OBJECTIVE_FLAGS)
def test_objective_teaches_the_classes_and_the_backdoor(name, data, tmp_path):
    model = lab.poison(tmp_path / "poisoned", data, 120, "--objective", name, *OBJECTIVE_FLAGS[name])
    found = lab.rates(model, model)
    assert found["accuracy"] >= LEAST_ACCURACY.get(name, 0.9) and found["asr"] >= 0.8, found


@pytest.mark.parametrize("name", TRIGGER_FLAGS)
def test_trigger_can_be_learned_and_does_nothing_to_a_sound_model(name, data, control, tmp_path, tmp_path_factory):
    if name == "patch":
        model = lab.shared_poisoned(tmp_path_factory)
    else:
        model = lab.poison(tmp_path / "poisoned", data, 120, "--poison.trigger", name, *TRIGGER_FLAGS[name])
    sound, found = lab.rates(control, model), lab.rates(model, model)
    assert sound["asr"] <= 0.15 and sound["accuracy"] >= 0.9, sound
    assert found["asr"] >= 0.8 and found["accuracy"] >= 0.9, found
