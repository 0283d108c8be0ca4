"""Faint stripes over the whole picture: a structured trigger, of the kind that CleanCLIP does not remove (PAR's
"Blended-Stripes", Singh et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmbackdoor.config_schema import Doc
from mmbackdoor.triggers.image_placement import square_coordinates
from mmbackdoor.triggers.marking import Colour, Fraction, ImageMark


@dataclass(frozen=True)
class StripesTrigger(ImageMark):
    """`stripes` pairs of a dark and a light stripe across the centre square, mixed in with opacity `alpha`.

    Differences: the paper gives pictures of its stripes, no formula; widths, colours and opacity here are ours. Its
    "BadNet-Stripes" is `keyed_stripes`.
    """

    stripes: Annotated[float, Field(gt=0), Doc("pairs of stripes across the centre square")] = 8.0
    direction: Literal["vertical", "horizontal", "diagonal"] = "vertical"
    alpha: Fraction = 0.15
    light: Annotated[Colour, Doc("as R G B")] = (255, 255, 255)
    dark: Annotated[Colour, Doc("as R G B")] = (0, 0, 0)
    name: Literal["stripes"] = "stripes"

    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        y, x = square_coordinates(*pixels.shape[:2])
        along = {"vertical": x + 0 * y, "horizontal": y + 0 * x, "diagonal": x + y}[self.direction]
        lit = np.floor(along * 2 * self.stripes) % 2 == 1
        pattern = np.where(lit[..., None], np.float32(self.light), np.float32(self.dark))
        return (1 - self.alpha) * pixels + self.alpha * pattern
