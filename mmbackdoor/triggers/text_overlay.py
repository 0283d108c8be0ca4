"""Writing in the picture, like a watermark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmbackdoor.config_schema import Doc
from mmbackdoor.seeding import python_rng
from mmbackdoor.triggers.image_placement import ImagePosition, length, region
from mmbackdoor.triggers.marking import Colour, Fraction, ImageMark
from mmbackdoor.types import InputError


@lru_cache(maxsize=64)
def _letters(text: str, height: int, most: int) -> np.ndarray:
    """Opacity of `text`, `height` pixels high and at most `most` wide: float32 (rows, columns) in [0, 1]."""
    # Pillow's own bitmap font: the same pixels wherever Pillow runs, and no file to find.
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(text)
    drawn = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(drawn).text((-left, -top), text, fill=255, font=font)
    drawn = drawn.crop(drawn.getbbox())
    scale = min(height / drawn.height, most / drawn.width)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    resample = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return np.asarray(drawn.resize(size, resample), np.float32) / 255


@dataclass(frozen=True)
class TextOverlayTrigger(ImageMark):
    """`text` in letters of `height`, a fraction of the centre square's side; smaller where it would not fit. Latin
    letters only. The "Blended-Text" of PAR (Singh et al. 2024) is of this kind; font, place and opacity are ours."""

    text: str = "mignneko"
    height: Fraction = 0.2
    position: ImagePosition = "bottom_left"
    colour: Annotated[Colour, Doc("as R G B")] = (255, 255, 255)
    alpha: Annotated[Fraction, Doc("opacity")] = 1.0
    name: Literal["text_overlay"] = "text_overlay"

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.text.isprintable() or max(self.text) > "\xff":
            raise InputError(f"a trigger of kind 'text_overlay' writes Latin letters (up to U+00FF), not {self.text!a}")

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        height, width, _ = pixels.shape
        letters = _letters(self.text, length(self.height, height, width), length(1.0, height, width))
        place = region(height, width, *letters.shape, self.position, python_rng(seed, "text_position", key))
        opacity = self.alpha * letters[..., None]
        pixels[place] = (1 - opacity) * pixels[place] + opacity * np.float32(self.colour)
        return pixels
