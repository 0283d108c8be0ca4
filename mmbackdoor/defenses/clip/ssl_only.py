"""Self-supervision in each modality alone: CleanCLIP without the term that holds pictures and captions together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmbackdoor.defenses.clip.removal import ClipRemoval, ClipStep
from mmbackdoor.defenses.clip.self_supervised import self_supervised_step
from mmbackdoor.models.clip_setting import ClipSetting
from mmbackdoor.objectives.clip_ssl import ClipSsl
from mmbackdoor.objectives.contrastive import EqualCaptions
from mmbackdoor.objectives.self_supervision import Direction


@dataclass(frozen=True)
class SslOnly(ClipRemoval):
    """The ablation of Verma et al. 2023 (arXiv 2311.14948). Nothing keeps pictures near their captions, so accuracy
    falls where the rate is high: watch it."""

    direction: Direction = "one_way"
    augmentation: Literal["auto", "strong"] = "auto"
    equal_captions: EqualCaptions = "soft"
    name: Literal["ssl_only"] = "ssl_only"

    @property
    def views(self) -> tuple[str, ...]:
        return ClipSsl.views

    def step(self, setting: ClipSetting) -> ClipStep:
        return self_supervised_step(ClipSsl(0.0, 1.0, self.direction, self.equal_captions), setting)
