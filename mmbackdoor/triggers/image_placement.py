"""Where an image trigger goes in a picture: always within its centre square, which a centre crop keeps."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from mmbackdoor.types import InputError

ImagePosition = Literal["top_left", "top_right", "bottom_left", "bottom_right", "centre", "random"]


def centre_square(height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side of the largest square in the middle of a picture."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def length(fraction: float, height: int, width: int) -> int:
    """`fraction` of the centre square's side in whole pixels, at least 1."""
    return max(1, round(fraction * min(height, width)))


def region(
    height: int, width: int, rows: int, columns: int, position: ImagePosition, rng: random.Random
) -> tuple[slice, slice]:
    """Where `rows` x `columns` pixels lie in the centre square, which must hold them; `rng` draws for "random"."""
    top, left, side = centre_square(height, width)
    down, right = side - rows, side - columns
    if position == "random":
        down, right = rng.randint(0, down), rng.randint(0, right)
    elif position == "centre":
        down, right = down // 2, right // 2
    else:
        down = 0 if position.startswith("top") else down
        right = 0 if position.endswith("left") else right
    return slice(top + down, top + down + rows), slice(left + right, left + right + columns)


def square_coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each pixel's middle, in units of the centre square's side: float64 (H, 1) from the top and (1, W) from the
    left. In the square they are in [0, 1); a pattern made of them is the same for a picture and its centre crop."""
    top, left, side = centre_square(height, width)
    return (np.arange(height)[:, None] + 0.5 - top) / side, (np.arange(width)[None] + 0.5 - left) / side


def sampled(pattern: np.ndarray, height: int, width: int) -> np.ndarray:
    """`pattern` (N, N, C) over the centre square, nearest cell to each pixel, repeated outside of it: (H, W, C)."""
    y, x = (np.floor(part % 1 * len(pattern)).astype(int) for part in square_coordinates(height, width))
    return pattern[y, x]


@lru_cache(maxsize=16)
def read_pattern(file: str, side: int) -> np.ndarray:
    """The picture `file` as float32 (side, side, 3) in 0..255, not to be written to. Raises `InputError`."""
    try:
        image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BOX)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the trigger's picture {file!r} cannot be read ({error}); give a PNG or JPEG file") from error
    pixels = np.asarray(image, np.float32)
    pixels.flags.writeable = False
    return pixels


def check_file(name: str, pattern: str, file: str | None) -> None:
    """Raises `InputError` where a pattern that is a picture has none, or another one has."""
    if (pattern == "file") != (file is not None):
        raise InputError(
            f"a trigger of kind {name!r} with pattern {pattern!r} and file {file!r}: give both, pattern file and the "
            "file, or neither"
        )
