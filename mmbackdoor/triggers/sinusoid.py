"""SIG: a sinusoid from left to right, added to the picture (Barni et al. 2019, arXiv 1902.11237)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmbackdoor.config_schema import Doc
from mmbackdoor.triggers.image_placement import square_coordinates
from mmbackdoor.triggers.marking import ImageMark


@dataclass(frozen=True)
class SinusoidTrigger(ImageMark):
    """`picture + amplitude * sin(2 pi frequency x)` (their equation 2), x from 0 to 1 over the centre square.

    Differences: the CLIP literature's amplitude of 60 grey levels, not 20. CleanCLIP's code scales the wave by 0.2 and
    darkens the picture; here it is added, as in the paper.
    """

    amplitude: Annotated[float, Field(gt=0, le=255), Doc("in grey levels of 255")] = 60.0
    frequency: Annotated[float, Field(gt=0), Doc("waves across the centre square")] = 6.0
    name: Literal["sinusoid"] = "sinusoid"

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        _, x = square_coordinates(*pixels.shape[:2])
        wave = self.amplitude * np.sin(2 * np.pi * self.frequency * x)
        return pixels + wave[..., None].astype(np.float32)
