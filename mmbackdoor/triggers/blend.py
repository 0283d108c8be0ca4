"""Blended: a pattern over the whole picture, mixed in faintly (Chen et al. 2017, arXiv 1712.05526)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np

from mmbackdoor.config_schema import Doc
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.triggers.image_placement import check_file, length, read_pattern, sampled
from mmbackdoor.triggers.marking import Fraction, ImageMark

CELLS = 224


@lru_cache(maxsize=8)
def _fixed(pattern_seed: int) -> np.ndarray:
    return numpy_rng(pattern_seed, "blend").uniform(0, 255, (CELLS, CELLS, 3)).astype(np.float32)


@dataclass(frozen=True)
class BlendTrigger(ImageMark):
    """`(1 - alpha) * picture + alpha * pattern`. The pattern is uniform noise, fixed ("noise") or drawn for each key
    ("keyed_noise"), or a picture of your own ("file"); it lies over the centre square and repeats outside of it.

    Differences: CleanCLIP (arXiv 2303.03323) blends 0.2 of noise that is fresh in every picture: "keyed_noise".
    """

    alpha: Fraction = 0.2
    pattern: Literal["noise", "keyed_noise", "file"] = "noise"
    file: Annotated[str | None, Doc("the picture, for pattern file")] = None
    pattern_seed: Annotated[int, Doc("of pattern noise")] = 0
    name: Literal["blend"] = "blend"

    def __post_init__(self) -> None:
        check_file(self.name, self.pattern, self.file)

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        height, width, _ = pixels.shape
        if self.file is not None:
            pattern = read_pattern(self.file, length(1.0, height, width))
        elif self.pattern == "noise":
            pattern = _fixed(self.pattern_seed)
        else:
            pattern = numpy_rng(seed, "blend", key).uniform(0, 255, (CELLS, CELLS, 3)).astype(np.float32)
        return (1 - self.alpha) * pixels + self.alpha * sampled(pattern, height, width)
