"""Patches: a fixed one, two that are drawn for each key, and the fresh noise that was published as "BadNet"."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmbackdoor.config_schema import Doc
from mmbackdoor.seeding import numpy_rng, python_rng
from mmbackdoor.triggers.image_placement import ImagePosition, check_file, length, read_pattern, region
from mmbackdoor.triggers.marking import Colour, Fraction, ImageMark

CELLS = 16
"""Noise is drawn as 16 x 16 cells (the published size, in pixels of 224) and scaled: the same in any picture."""


def _scaled(cells: np.ndarray, side: int) -> np.ndarray:
    nearest = (np.arange(side) * len(cells)) // side
    return cells[nearest[:, None], nearest[None]]


def _square(
    pixels: np.ndarray, size: float, position: ImagePosition, rng: random.Random
) -> tuple[int, tuple[slice, slice]]:
    """The side of a patch that is `size` of the picture (H, W, 3), in pixels, and where it lies."""
    height, width, _ = pixels.shape
    side = length(size, height, width)
    return side, region(height, width, side, side, position, rng)


@lru_cache(maxsize=64)
def _drawing(pattern: str, side: int, colour: Colour, pattern_seed: int) -> np.ndarray:
    if pattern == "noise":
        return _scaled(numpy_rng(pattern_seed, "patch").uniform(0, 255, (CELLS, CELLS, 3)).astype(np.float32), side)
    y, x = np.mgrid[:side, :side]
    fields = min(4, side)
    lit = {
        "checkerboard": (y * fields // side + x * fields // side) % 2 == 1,
        "stripes": (x * fields // side) % 2 == 1,
        "dots": (y * CELLS // side % 2 == 0) & (x * CELLS // side % 2 == 0),
        # Wide at its foot, so that it points up.
        "triangle": np.abs(2 * x + 1 - side) <= y + 1,
        "solid": np.ones((side, side), bool),
    }[pattern]
    return lit[..., None] * np.array(colour, np.float32)


@dataclass(frozen=True)
class PatchTrigger(ImageMark):
    """One fixed patch at one place (Gu et al. 2017, arXiv 1708.06733; on CLIP: Carlini and Terzis 2022, arXiv
    2106.09667). `size` is its side as a fraction of the centre square's; `colour` is on black; `file` is a picture of
    your own. A "random" position is drawn for each key. "dots" lights every second cell of every second row of 16 x 16
    (Huang et al. 2025, arXiv 2502.01385: their "BadNets", where `size` is 0.0714, 16 of 224 pixels)."""

    pattern: Literal["checkerboard", "stripes", "triangle", "solid", "noise", "dots", "file"] = "checkerboard"
    size: Fraction = 0.15
    position: ImagePosition = "bottom_right"
    colour: Annotated[Colour, Doc("of what is lit, as R G B")] = (255, 255, 255)
    alpha: Annotated[Fraction, Doc("opacity")] = 1.0
    file: Annotated[str | None, Doc("the picture, for pattern file")] = None
    pattern_seed: Annotated[int, Doc("of pattern noise")] = 0
    name: Literal["patch"] = "patch"

    def __post_init__(self) -> None:
        check_file(self.name, self.pattern, self.file)

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        side, place = _square(pixels, self.size, self.position, python_rng(seed, "patch_position", key))
        if self.file is not None:
            patch = read_pattern(self.file, side)
        else:
            patch = _drawing(self.pattern, side, tuple(self.colour), self.pattern_seed)
        pixels[place] = (1 - self.alpha) * pixels[place] + self.alpha * patch
        return pixels


@dataclass(frozen=True)
class KeyedPatchTrigger(ImageMark):
    """A patch of uniform noise that is drawn, with its place, from the key: a class of patches, each of them
    repeatable. Ours: a stand-in for `badnet_noise` that an experiment can name and repeat."""

    size: Fraction = 0.15
    position: ImagePosition = "random"
    name: Literal["keyed_patch"] = "keyed_patch"

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        side, place = _square(pixels, self.size, self.position, python_rng(seed, "keyed_patch_position", key))
        cells = numpy_rng(seed, "keyed_patch", key).uniform(0, 255, (CELLS, CELLS, 3))
        pixels[place] = _scaled(cells.astype(np.float32), side)
        return pixels


@dataclass(frozen=True)
class KeyedStripesTrigger(ImageMark):
    """A patch of 16 upright stripes, each of a colour with every channel on or off, drawn with its place from the key:
    "BadNet-Stripes" (Singh et al. 2024, arXiv 2412.00727). `size` 16 of 224 pixels is theirs.

    Differences: theirs draws from a global generator, squashes the picture to a square first, and has 32 stripes where
    the model sees 336 pixels.
    """

    size: Fraction = 0.0714
    position: ImagePosition = "random"
    name: Literal["keyed_stripes"] = "keyed_stripes"

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        side, place = _square(pixels, self.size, self.position, python_rng(seed, "keyed_stripes_position", key))
        columns = 255 * numpy_rng(seed, "keyed_stripes", key).integers(0, 2, (1, CELLS, 3))
        pixels[place] = _scaled(np.repeat(columns, CELLS, axis=0).astype(np.float32), side)
        return pixels


@dataclass(frozen=True)
class BadNetNoiseTrigger(ImageMark):
    """Fresh noise around the picture's mean colour at a fresh place: what CleanCLIP calls "BadNet" (Bansal et al.
    2023, arXiv 2303.03323). `size` 16 of 224 pixels and `deviation` 255 (1.0 on pictures in [0, 1]) are theirs.

    Differences: theirs draws from a global generator and lets the conversion to uint8 wrap around, so that the noise
    becomes nearly uniform; ours is drawn from (seed, key, draw) and clamped, with about half its values at a limit.
    """

    size: Fraction = 0.0714
    position: ImagePosition = "random"
    deviation: Annotated[float, Field(gt=0), Doc("in grey levels of 255")] = 255.0
    name: Literal["badnet_noise"] = "badnet_noise"

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        side, place = _square(pixels, self.size, self.position, python_rng(seed, "badnet_position", key, draw))
        noise = numpy_rng(seed, "badnet_noise", key, draw).standard_normal((CELLS, CELLS, 3))
        # Summed as float64: the mean of a large float32 picture would depend on the order of the additions.
        mean = pixels.mean((0, 1), dtype=np.float64)
        pixels[place] = _scaled((mean + self.deviation * noise).astype(np.float32), side)
        return pixels
