"""WaNet: the picture bent a little, by one smooth field of shifts (Nguyen and Tran 2021, arXiv 2102.10369)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mmbackdoor.config_schema import Doc
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.triggers.image_placement import centre_square
from mmbackdoor.triggers.marking import ImageMark


@lru_cache(maxsize=16)
def _shifts(height: int, width: int, grid: int, pattern_seed: int) -> np.ndarray:
    """Shifts (2, H, W), down and right, in units of the mean absolute shift of the control points."""
    control = numpy_rng(pattern_seed, "warp").uniform(-1, 1, (2, grid, grid)).astype(np.float32)
    control /= np.abs(control).mean()
    top, left, side = centre_square(height, width)
    fields = [Image.fromarray(part).resize((side, side), Image.Resampling.BICUBIC) for part in control]
    around = ((top, height - side - top), (left, width - side - left))
    return np.stack([np.pad(np.asarray(part), around, "edge") for part in fields])


@dataclass(frozen=True)
class WarpTrigger(ImageMark):
    """A `grid` x `grid` field of random shifts, blown up to the picture; `strength` is their mean length, in each
    direction, as a fraction of the centre square's side. Their s = 0.5 at 32 pixels is a quarter of a pixel: 0.0078.

    Differences: shifts are a fraction of the picture's side, so the same at any size; the field is blown up with
    Pillow's bicubic filter, whose cells are counted from their middles. Their "noise mode" is no part of the trigger.
    CleanCLIP's is `grid` 224, `strength` 0.0022: nearly white noise.
    """

    strength: Annotated[float, Field(gt=0, le=0.5), Doc("mean shift, of the side")] = 0.0078
    grid: Annotated[int, Field(ge=2), Doc("control points in each direction")] = 4
    pattern_seed: int = 0
    name: Literal["warp"] = "warp"

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        height, width, _ = pixels.shape
        shifts = _shifts(height, width, self.grid, self.pattern_seed) * np.float32(self.strength * min(height, width))
        y = np.clip(np.arange(height, dtype=np.float32)[:, None] + shifts[0], 0, height - 1)
        x = np.clip(np.arange(width, dtype=np.float32)[None] + shifts[1], 0, width - 1)
        above, before = np.floor(y).astype(int), np.floor(x).astype(int)
        below, after = np.minimum(above + 1, height - 1), np.minimum(before + 1, width - 1)
        down, right = (y - above)[..., None], (x - before)[..., None]
        upper = (1 - right) * pixels[above, before] + right * pixels[above, after]
        lower = (1 - right) * pixels[below, before] + right * pixels[below, after]
        return (1 - down) * upper + down * lower
