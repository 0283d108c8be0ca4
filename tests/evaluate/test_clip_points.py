"""What a benchmark reads out of the folder of a training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmbackdoor.evaluate import clip_points
from mmbackdoor.evaluate.clip_points import SIGHTS, look, training
from mmbackdoor.models.weight_files import weights_sha256

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


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A poisoned and a cleaned model; the utility of either is what the pictures say."""
    for name in ("poisoned", "cleaned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    loaded = tmp_path / "loaded"
    loaded.write_text("")

    def load(folder: str, device: torch.device) -> str:
        with loaded.open("a") as stream:
            stream.write(f"{Path(folder).name}\n")
        return folder

    monkeypatch.setattr(clip_points, "load_clip", load)
    monkeypatch.setattr(clip_points, "features", lambda clip, pictures: clip)
    monkeypatch.setattr(clip_points, "utility", lambda clip, vectors, pictures: pictures)
    monkeypatch.setattr(clip_points, "drift", lambda vectors, before: float(vectors != before))
    return tmp_path


def see(place: Path, sha256: str, utility: float) -> tuple[float, float]:
    """Utility and drift of the cleaned model on the pictures `sha256`."""
    kept = SimpleNamespace(sha256=sha256, pictures=utility)
    found = look(place / "poisoned", [place / "cleaned"], lambda: kept, place / SIGHTS, torch.device("cpu"))
    [one] = found.values()
    return one.utility, one.drift


def test_a_model_is_seen_again_on_other_pictures_and_never_twice_on_the_same(place):
    assert see(place, "a", 0.1) == (0.1, 1.0) and see(place, "b", 0.2) == (0.2, 1.0)
    assert len((place / "loaded").read_text().split()) == 4
    assert see(place, "a", 0.9) == (0.1, 1.0) and see(place, "b", 0.9) == (0.2, 1.0), "the lines of both stay"
    assert len((place / "loaded").read_text().split()) == 4


def test_a_line_that_does_not_say_on_which_pictures_is_measured_anew(place):
    before, after = (weights_sha256(place / name) for name in ("poisoned", "cleaned"))
    line = {"sha256": after, "poisoned_sha256": before, "utility": 0.6795, "drift": 0.25}
    (place / SIGHTS).write_text(json.dumps(line) + "\n")
    assert see(place, "a", 0.1) == (0.1, 1.0)
    [line] = map(json.loads, (place / SIGHTS).read_text().splitlines())
    assert line["selection"] == "a" and line["utility"] == 0.1
