"""A tiny CLIP is poisoned, measured, cleaned by every removal, and measured again: the attack rate falls, accuracy stays.
And by what the poisoned model sees, every detector finds the few poisoned pairs that have strayed into a clean set."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from mmbackdoor.defenses.clip import CLIP_DEFENSES
from mmbackdoor.detectors import DETECTORS
from mmbackdoor.evaluate.detection import encoded_batches, judge, score_batches, split
from mmbackdoor.models.clip import load_clip
from mmbackdoor.shards.loader import ShardLoader
from tests.conformance import clip_lab as lab

RECALIBRATED = ("--recalibrate_batches", 8)
STRONG = ("--defense.augmentation", "strong")
CASES = {
    "finetune": ("--max_train_steps", 50),
    "cleanclip": ("--max_train_steps", 50, *STRONG),
    "ssl_only": ("--max_train_steps", 45, "--lr", 3e-3, *STRONG),
    "shrink_perturb": ("--max_train_steps", 45, "--defense.keep", 0.8, "--defense.noise", 0.2, *RECALIBRATED, *STRONG),
    "par": ("--max_train_steps", 50, "--defense.augmentation", "none", "--defense.threshold", 0.7),
    "distill_anchor": ("--max_train_steps", 45, *RECALIBRATED),
    "reset_distill": ("--max_train_steps", 40, *RECALIBRATED),
}
MOST = {"finetune": 0.9, "cleanclip": 0.7, "ssl_only": 0.8, "shrink_perturb": 0.4, "par": 0.8, "distill_anchor": 0.7,
        "reset_distill": 0.2}  # fmt: skip
"""What is left of the attack after so few steps, as a share of what it was. Plain fine-tuning and `par` are baselines:
they only have to lower it."""
LEAST = {"ssl_only": 0.25, "distill_anchor": 0.85}
"""Accuracy, 0.9 where nothing is said. Self-supervision alone does not pass: it lets go of the captions, here it loses half
of the accuracy. It is only held to be better than chance (0.08)."""


LEAST_TRIGGERED = {"reset_distill": 0.5, "shrink_perturb": 0.5}
"""Accuracy on triggered pictures; of the others, only more than before: a rate falls with the head too."""


def test_every_removal_is_tested():
    assert CASES.keys() == MOST.keys() == CLIP_DEFENSES.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return lab.shared_data(tmp_path_factory)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = lab.shared_poisoned(tmp_path_factory)
    return folder, lab.rates(folder, folder)


@pytest.mark.parametrize("name", CASES)
def test_removal_lowers_the_attack_rate_and_keeps_accuracy(name, data, poisoned, tmp_path):
    parent, before = poisoned
    assert before["asr"] >= 0.9 and before["accuracy"] >= 0.95 and before["triggered_accuracy"] <= 0.25
    after = lab.rates(lab.clean(parent, tmp_path / "cleaned", data, "--defense", name, *CASES[name]), parent)
    assert after["asr"] <= MOST[name] * before["asr"], after
    assert after["triggered_accuracy"] > LEAST_TRIGGERED.get(name, before["triggered_accuracy"]), after
    assert after["accuracy"] >= LEAST.get(name, 0.9), after


@pytest.fixture(scope="module")
def suspects(data, poisoned, tmp_path_factory):
    """All pairs of the clean set with 8 strays, as the poisoned model encodes them."""
    shards = lab.strays(tmp_path_factory.mktemp("strays"), data, 8)
    loader = ShardLoader(shards, seed=0, batch_size=1500, once=True, shuffle=True)
    return list(encoded_batches(loader, load_clip(str(poisoned[0])), Accelerator(cpu=True)))


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_finds_strays(name, poisoned, suspects):
    assert poisoned[1]["asr"] >= 0.9
    scored = score_batches(DETECTORS[name](), suspects, torch.device("cpu"))
    found = judge(*split(scored, 0.05))
    assert (found["samples"], found["poisoned"]) == (1500, 8)
    assert found["auroc"] >= 0.95 and found["poisoned_dropped"] >= 6, found
