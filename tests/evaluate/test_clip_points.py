"""What a benchmark reads out of the folder of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmbackdoor.evaluate.clip_points import training

FACTS = {"stage": "cleaned", "objective": "clip", "seed": 0}


def run(folder: Path, lines: list[dict[str, float | None]]) -> Path:
    config = {"train": {"train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 1.0}}
    content = {"schema": 1, "config": config, "counters": {"pairs": 40}, "world_size": 2, "seconds": 3.0,
               "status": "finished", "error": None}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(content))
    logged = (json.dumps({"step": number} | line) + "\n" for number, line in enumerate(lines, 1))
    (folder / "train.jsonl").write_text("".join(logged))
    return folder


def test_it_is_what_was_in_force_not_what_was_asked_for(tmp_path):
    logged = [(0.1, 0.02), (0.2, 0.04), (0.2, 0.0), (0.05, 0.02)]
    lines = [{"learning_rate": rate, "weight_decay": 7.0, "false_negatives": share} for rate, share in logged]
    found = training(run(tmp_path, lines), FACTS)
    assert (found.steps, found.pairs, found.batch_size, found.samples_seen) == (4, 40, 16, 64)
    assert (found.peak_rate, found.steps_to_peak, found.weight_decay) == (0.2, 2, 7.0)
    assert found.false_negatives == pytest.approx(0.02)


def test_what_was_not_logged_is_not_known(tmp_path):
    found = training(run(tmp_path, [{"learning_rate": 0.1, "false_negatives": None}]), FACTS)
    assert (found.peak_rate, found.weight_decay, found.false_negatives) == (0.1, None, None)
    nothing = training(run(tmp_path, []), FACTS)
    assert (nothing.steps, nothing.peak_rate, nothing.steps_to_peak) == (0, None, None)
