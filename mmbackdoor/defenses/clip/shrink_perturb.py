"""Shrink and perturb: all weights a step towards a random beginning, then CleanCLIP (Ash and Adams 2020, arXiv
1910.08475; for cleaning: Verma et al. 2023, arXiv 2311.14948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mmbackdoor.defenses.clip.removal import ClipRemoval, ClipStep
from mmbackdoor.defenses.clip.self_supervised import self_supervised_step
from mmbackdoor.models.clip_init import shrink_and_perturb
from mmbackdoor.models.clip_setting import ClipSetting
from mmbackdoor.objectives.clip_ssl import ClipSsl
from mmbackdoor.objectives.contrastive import EqualCaptions
from mmbackdoor.objectives.self_supervision import Direction

if TYPE_CHECKING:
    from mmbackdoor.models.clip import ClipModel


@dataclass(frozen=True)
class ShrinkPerturb(ClipRemoval):
    """weights = `keep` * weights + `noise` * a fresh random draw, once; then the loss of CleanCLIP. Defaults are those of
    the second paper. Differences: the temperature is left alone; running statistics of BatchNorm are not touched, they
    follow in training."""

    keep: Annotated[float, Field(ge=0, le=1)] = 0.95
    noise: Annotated[float, Field(ge=0)] = 1e-4
    clip_weight: Annotated[float, Field(ge=0)] = 1.0
    ssl_weight: Annotated[float, Field(ge=0)] = 1.0
    direction: Direction = "one_way"
    augmentation: Literal["auto", "strong"] = "auto"
    equal_captions: EqualCaptions = "soft"
    name: Literal["shrink_perturb"] = "shrink_perturb"

    def __post_init__(self) -> None:
        # Raises for weights that leave nothing to learn.
        self.objective()

    def objective(self) -> ClipSsl:
        return ClipSsl(self.clip_weight, self.ssl_weight, self.direction, self.equal_captions)

    @property
    def views(self) -> tuple[str, ...]:
        return ClipSsl.views

    def edit(self, clip: ClipModel, seed: int) -> None:
        shrink_and_perturb(clip, self.keep, self.noise, seed)

    def step(self, setting: ClipSetting) -> ClipStep:
        return self_supervised_step(self.objective(), setting)
