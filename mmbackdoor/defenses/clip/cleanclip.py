"""CleanCLIP: fine-tuning with CLIP's loss and self-supervision in each modality, which parts the trigger's features
from the target's caption (Bansal et al. 2023, arXiv 2303.03323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.defenses.clip.removal import ClipRemoval, ClipStep
from mmbackdoor.defenses.clip.self_supervised import self_supervised_step
from mmbackdoor.models.clip_setting import ClipSetting
from mmbackdoor.objectives.clip_ssl import ClipSsl
from mmbackdoor.objectives.contrastive import EqualCaptions
from mmbackdoor.objectives.self_supervision import Direction


@dataclass(frozen=True)
class CleanClip(ClipRemoval):
    """Equation 4 with both weights 1; published with 100 000 clean pairs, 10 epochs, batch 64, rate 1e-5, 50 steps of
    warm-up. Differences: captions are augmented anew in every epoch; `equal_captions` (published: `plain`); of the recipe
    `batch_norm` (`mixed`) and `max_grad_norm` (none); the published code had no warm-up in effect and went on with the
    poisoned run's Adam moments and weight decay, here all are as asked for."""

    clip_weight: Annotated[float, Field(ge=0)] = 1.0
    ssl_weight: Annotated[float, Field(ge=0)] = 1.0
    direction: Direction = "one_way"
    augmentation: Literal["auto", "strong"] = "auto"
    equal_captions: EqualCaptions = "soft"
    name: Literal["cleanclip"] = "cleanclip"

    def __post_init__(self) -> None:
        # Raises for weights that leave nothing to learn.
        self.objective()

    def objective(self) -> ClipSsl:
        return ClipSsl(self.clip_weight, self.ssl_weight, self.direction, self.equal_captions)

    @property
    def views(self) -> tuple[str, ...]:
        return ClipSsl.views

    def step(self, setting: ClipSetting) -> ClipStep:
        return self_supervised_step(self.objective(), setting)
