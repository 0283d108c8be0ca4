"""Fine-tuning on clean pairs with CLIP's own loss (MMCL): the removal that everyone tries first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmbackdoor.defenses.clip.removal import Augmentation, ClipRemoval, ClipStep
from mmbackdoor.models.clip_setting import ClipSetting, PairBatch
from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss


@dataclass(frozen=True)
class ClipFinetune(ClipRemoval):
    """Symmetric InfoNCE (Radford et al. 2021, arXiv 2103.00020, figure 3); the baseline of CleanCLIP, which leaves most
    backdoors. With an `augmentation` other than `none` the augmented picture stands for the picture."""

    augmentation: Augmentation = "none"
    equal_captions: EqualCaptions = "soft"
    name: Literal["finetune"] = "finetune"

    @property
    def views(self) -> tuple[str, ...]:
        return ("image" if self.augmentation == "none" else "image_aug", "text")

    def step(self, setting: ClipSetting) -> ClipStep:
        def step_fn(batch: PairBatch) -> dict[str, Tensor]:
            outputs = setting.encode(batch, self.views)
            return clip_loss(
                outputs.features[self.views[0]],
                outputs.features["text"],
                outputs.logit_scale,
                batch.captions,
                equal_captions=self.equal_captions,
                rank=setting.rank,
                world_size=setting.world_size,
            )

        return step_fn
