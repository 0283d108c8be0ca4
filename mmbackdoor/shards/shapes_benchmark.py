"""The pictures of a benchmark on drawn shapes: pairs to poison, clean pairs, and held-out pictures with classes.

Four sets whose use is apart: what the poisoned model is trained on, what it is cleaned with (other pictures of the same
combinations), what a blind rule selects on, and what is measured on (combinations that no training saw, disjoint too).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.shards.shapes import SHAPES, all_scenes, split_scenes
from mmbackdoor.shards.shapes_classes import classnames, write_shapes_classes
from mmbackdoor.shards.shapes_data import write_shapes

# With this split every colour of every shape is in all parts, so that each has all 48 classes.
SELECTION, EVALUATION, SPLIT_SEED = 0.25, 0.35, 1
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class BenchmarkShapes:
    """How much to draw. Few pairs leave accuracy room to fall: with many, every model reaches 100 %."""

    train_samples: Annotated[Count, Doc("pairs to pre-train on, some of them poisoned")] = 4000
    clean_samples: Annotated[Count, Doc("clean pairs to clean with")] = 2000
    evaluation_per_class: Annotated[Count, Doc("pictures of each of 48 classes to measure on")] = 20
    selection_per_class: Annotated[Count, Doc("pictures of each of 48 classes for the blind rule")] = 10
    resolution: Annotated[int, Field(ge=8), Doc("side of a picture in pixels")] = 32
    seed: Annotated[int, Field(ge=0), Doc("of the pictures; every seed of the benchmark sees the same ones")] = 0


@dataclass(frozen=True)
class BenchmarkData:
    """Where the four sets are: shards of pairs, and folders or shards with classes."""

    train: str
    clean: str
    evaluation: str
    selection: str


def benchmark_data(folder: Path) -> BenchmarkData:
    """Where `write_benchmark_shapes` writes them."""
    pairs = (f"{folder}/{name}-*.tar" for name in ("train", "clean"))
    return BenchmarkData(*pairs, str(folder / "evaluation"), str(folder / "selection"))


def write_benchmark_shapes(folder: Path, shapes: BenchmarkShapes, target: str) -> None:
    """Draw the four sets into `folder`; what is there already with the same settings stays. `target` is the backdoor's
    class, one more where no picture shows it; only the evaluation knows of it."""
    splits = split_scenes(all_scenes(SHAPES), SELECTION, EVALUATION, SPLIT_SEED)
    write_shapes(folder, "train", splits["train"], shapes.train_samples, shapes.resolution, shapes.seed)
    write_shapes(folder, "clean", splits["train"], shapes.clean_samples, shapes.resolution, shapes.seed)
    known = classnames(splits["evaluation"])
    held_out = {
        "evaluation": (shapes.evaluation_per_class, [] if target in known else [target]),
        "selection": (shapes.selection_per_class, []),
    }
    for name, (count, extra) in held_out.items():
        write_shapes_classes(
            folder / name, splits[name], count, shapes.resolution, seed=shapes.seed, extra_classes=extra
        )
