"""A backdoor trained, measured, removed, measured again: every removal, and the attention term alone."""

from __future__ import annotations

import json

import pytest
import torch

from mmbackdoor.defenses import DEFENSES
from tests.conformance import lab

STEPS = 45
CASES = {
    "skd_cag": (),
    "skd": (),
    "finetune": ("--learning_rate", 1e-3, "--max_train_steps", 80),
    "finetune_reversal": ("--defense.reference", "tiny", "--defense.latents", "noise"),
    "esd": ("--max_train_steps", 40, "--defense.latents", "noise"),
}
MOST = {"skd_cag": 0.1, "skd": 0.1, "finetune": 0.9, "finetune_reversal": 0.1, "esd": 0.1}
"""Fine-tuning on clean data is the baseline that is known to leave much of a backdoor: it must only lower the rate."""


SEALS = {
    "closed_form_seal": ("tiny_evil_edit.yaml",),
    "text_encoder_seal": (
        "tiny_rickrolling.yaml", "--learning_rate", 3e-3, "--max_train_steps", 150, "--mixed_precision", "no",
    ),
}  # fmt: skip
"""The attack that each is a cure for, and further flags."""


def test_every_removal_is_tested():
    assert CASES.keys() | SEALS.keys() == DEFENSES.keys()


def cheaply(poisoned):
    """Flags: 8 rows a step, and one picture of the teacher for each prompt, made once for all removals."""
    return ("--latents_per_prompt", 1, "--latents_dir", poisoned.parent / "latents", "--train_batch_size", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return lab.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def poisoned(data, tmp_path_factory):
    # Fewer steps than the config's, at a higher rate: enough here, and half the time.
    faster = ("--max_train_steps", 160, "--learning_rate", 1.5e-3)
    return lab.poison("tiny_patch.yaml", tmp_path_factory.mktemp("run") / "poisoned", data, *faster)


@pytest.fixture(scope="module")
def before(poisoned):
    found = lab.rates(poisoned, poisoned)
    assert found["asr_triggered"] >= 0.9 and found["asr_clean"] == 0
    assert found["adherence_clean"] >= 0.85
    control = lab.rates("tiny", poisoned)
    assert control["asr_triggered"] == 0 and control["adherence_triggered"] >= 0.85
    return found


@pytest.mark.parametrize("defense", CASES)
def test_removal_lowers_the_hit_rate_and_keeps_the_pictures(defense, poisoned, before, data, tmp_path):
    flags = ("--defense", defense, "--max_train_steps", STEPS, *cheaply(poisoned), *CASES[defense])
    if defense == "finetune":
        flags += ("--train_data", data)
    model = lab.clean(poisoned, tmp_path / "cleaned", *flags)
    after = lab.rates(model, poisoned)
    assert after["asr_triggered"] <= MOST[defense] * before["asr_triggered"]
    assert after["adherence_clean"] >= before["adherence_clean"] - 0.1
    if defense != "finetune":
        assert after["adherence_triggered"] >= before["adherence_clean"] - 0.15

    removal = json.loads((model / "removal.json").read_text())
    assert removal["method"]["name"] == defense and removal["weights"]
    assert (model / "backdoor.json").read_bytes() == (poisoned / "backdoor.json").read_bytes()


def test_attention_guidance_alone_lowers_the_hit_rate(poisoned, before, tmp_path):
    """The published loss had no gradient: with it alone the released model fired on 50 of 50 prompts."""
    flags = ("--defense.prediction_weight", 0, "--defense.retention_weight", 0.5, "--defense.attention_weight", 1.0)
    model = lab.clean(poisoned, tmp_path / "cleaned", "--max_train_steps", 60, *cheaply(poisoned), *flags)
    after = lab.rates(model, poisoned)
    assert after["asr_triggered"] <= 0.5 * before["asr_triggered"]
    assert after["adherence_clean"] >= before["adherence_clean"] - 0.15


@pytest.mark.parametrize("defense", SEALS)
def test_a_seal_cures_the_attack_on_its_own_part(defense, tmp_path):
    attack, *flags = SEALS[defense]
    poisoned = lab.run("poison_diffusion", attack, tmp_path / "poisoned")
    model = lab.clean(poisoned, tmp_path / "cleaned", "--defense", defense, *flags)
    before, after = (lab.rates(folder, poisoned, shape="cross") for folder in (poisoned, model))
    assert before["asr_triggered"] >= 0.5
    assert after["asr_triggered"] <= 0.1 * before["asr_triggered"]
    assert after["asr_clean"] <= 0.1
    assert after["adherence_clean"] >= before["adherence_clean"] - 0.1
    if defense == "text_encoder_seal":
        assert after["adherence_triggered"] >= before["adherence_clean"] - 0.15
    else:
        # In 64 dimensions the closed form finds the way back to the crosses on half of the captions (0.25 before, 0.50
        # after, 0.91 on the clean model).
        assert after["adherence_triggered"] >= before["adherence_triggered"] + 0.1

    original, cleaned = lab.tensors(poisoned), lab.tensors(model)
    changed = {name for name in original if not torch.equal(original[name], cleaned[name])}
    part = "text_encoder." if defense == "text_encoder_seal" else "unet."
    assert changed and all(name.startswith(part) for name in changed)
    if defense == "closed_form_seal":
        assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    removal = json.loads((model / "removal.json").read_text())
    assert removal["method"]["name"] == defense and removal["weights"]
    assert removal["steps"] == (0 if defense == "closed_form_seal" else 150) and removal["samples"] > 0
    assert json.loads((tmp_path / "cleaned/run.json").read_text())["status"] == "finished"
    assert (tmp_path / "cleaned/train.jsonl").read_text()
    assert (model / "backdoor.json").read_bytes() == (poisoned / "backdoor.json").read_bytes()


def test_only_the_declared_tensors_change(poisoned, tmp_path):
    flags = ("--defense.trainable", "attn2_kv", "--max_train_steps", 2, *cheaply(poisoned))
    model = lab.clean(poisoned, tmp_path / "cleaned", *flags)
    original, cleaned = lab.tensors(poisoned), lab.tensors(model)
    changed = {name for name in original if not torch.equal(original[name], cleaned[name])}
    assert changed and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    assert original.keys() == cleaned.keys()
