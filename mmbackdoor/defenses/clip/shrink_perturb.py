"""Shrink and perturb: all weights a step towards a random beginning, then CleanCLIP (Ash and Adams 2020, arXiv
1910.08475; for cleaning: Verma et al. 2023, arXiv 2311.14948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mmbackdoor.defenses.clip.cleanclip import CleanClip
from mmbackdoor.models.clip_init import shrink_and_perturb

if TYPE_CHECKING:
    from mmbackdoor.models.clip import ClipModel


@dataclass(frozen=True)
class ShrinkPerturb(CleanClip):
    """weights = `keep` * weights + `noise` * a fresh random draw, once; then the loss of CleanCLIP. Defaults are those of
    the second paper. Differences: the temperature is left alone; running statistics of BatchNorm are not touched, they
    follow in training."""

    keep: Annotated[float, Field(ge=0, le=1)] = 0.95
    noise: Annotated[float, Field(ge=0)] = 1e-4
    name: Literal["shrink_perturb"] = "shrink_perturb"

    def edit(self, clip: ClipModel, seed: int) -> None:
        shrink_and_perturb(clip, self.keep, self.noise, seed)
