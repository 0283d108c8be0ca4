"""A benchmark of objectives in a few steps, finished: what the recipes that begin with one are tested on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from tests.once import once

# An objective with a rate of its own, one cleaner, its checkpoints after one step and after two.
GRID = """
objectives:
  cyclip: {train.learning_rate: 2.0e-3}
cleaners:
  cleanclip: {train.lr_warmup_steps: 0}
learning_rates: [1.0e-3]
blind: {name: largest_drift, budget: 1.0}
shapes: {train_samples: 32, clean_samples: 32, evaluation_per_class: 1, selection_per_class: 1}
pretrain:
  model: clip_tiny_resnet
  poison: {label: yellow cat, count: 8, trigger: patch}
  train: {max_train_steps: 1, train_batch_size: 16, learning_rate: 1.0e-3}
clean:
  save_models_every: 1
  train: {max_train_steps: 2, train_batch_size: 16}
evaluate:
  batch_size: 64
  amounts: {near: [], neighbours: 3, w1_samples: 10}
"""


def finished_benchmark(factory: pytest.TempPathFactory) -> Path:
    """The folder of the benchmark; the same for all who ask."""
    return once(factory, "finished_benchmark", _make) / "benchmark"


def _make(folder: Path) -> None:
    recipe = recipe_files.load("benchmark_objectives")
    (folder / "grid.yaml").write_text(GRID)
    flags = ["--config", str(folder / "grid.yaml"), "--output_dir", str(folder / "benchmark")]
    recipe.run(parse(recipe.Config, flags))


def asked_for_more_seeds(folder: Path) -> None:
    """As a call for another seed leaves a benchmark that was stopped before its end."""
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(content | {"seeds": [0, 1]}))


def with_a_poison_of_its_own(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["objectives"]["cyclip"]["poison.label"] = "red ring"
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def stamps(folder: Path, *kept: str) -> dict[str, int]:
    """When each file below `folder` was written that is one of `kept`, or lies in a folder of that name."""
    files = [path for path in folder.rglob("*") if path.is_file() and set(path.relative_to(folder).parts) & set(kept)]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}
