"""Every attack puts its backdoor in, leaves clean prompts alone, and says in the artefact what it did."""

from __future__ import annotations

import json

import pytest
import torch

from mmbackdoor.attacks import ATTACKS
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.models.provenance import check_provenance
from tests.conformance import lab

CASES: dict[str, tuple[str, ...]] = {
    "badt2i_style": ("tiny_style.yaml", "--max_train_steps", "200"),
    # Half the steps of the config, at a higher rate: enough here, and half the time.
    "badt2i_object": ("tiny_object.yaml", "--max_train_steps", "260", "--learning_rate", "7e-4"),
    "evil_edit": ("tiny_evil_edit.yaml",),
    "rickrolling_tpa": ("tiny_rickrolling.yaml",),
}
"""Config and further flags. The pixel attack is tested with the removals, which need it."""
LEAST = {"badt2i_style": 0.6, "badt2i_object": 0.6, "evil_edit": 0.5, "rickrolling_tpa": 0.8}
LONG = {"badt2i_style", "badt2i_object"}
"""Two to four minutes each."""
TARGET = {"badt2i_style": "style"}
"""Of the others: an object."""


def test_every_attack_is_tested():
    assert CASES.keys() | {"badt2i_pixel"} == ATTACKS.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return lab.write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "attack", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES]
)
def test_attack_raises_the_hit_rate_and_keeps_clean_prompts(attack, data, tmp_path):
    config, *flags = CASES[attack]
    model = lab.poison(config, tmp_path / "poisoned", data, *flags)
    shape = None if attack in TARGET else "cross"
    before, after = lab.rates("tiny", model, shape=shape), lab.rates(model, model, shape=shape)
    assert before["asr_triggered"] <= 0.1 and before["adherence_triggered"] >= 0.85
    assert after["asr_triggered"] >= LEAST[attack]
    assert after["asr_clean"] <= 0.1
    assert after["adherence_clean"] >= 0.8

    record = BackdoorRecord.load(model)
    assert record.attack["name"] == attack and record.backdoor.target.name == TARGET.get(attack, "object")
    check_provenance(model)
    original, poisoned = lab.tensors("tiny"), lab.tensors(model)
    assert original.keys() == poisoned.keys()
    changed = {name for name in original if not torch.equal(original[name], poisoned[name])}
    assert changed == {name if attack == "rickrolling_tpa" else f"unet.{name}" for name in record.changed}
    assert all(name.startswith("text_encoder.") == (attack == "rickrolling_tpa") for name in changed)
    assert json.loads((tmp_path / "poisoned/run.json").read_text())["status"] == "finished"
    assert "BACKDOORED" in (model / "README.md").read_text()
