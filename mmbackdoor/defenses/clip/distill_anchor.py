"""Fine-tuning on augmented pictures, held to what the incoming model makes of the same pictures unaltered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.defenses.clip.removal import ClipRemoval, ClipStep
from mmbackdoor.models.clip_setting import ClipSetting, PairBatch
from mmbackdoor.objectives.anchor import similarity_distillation
from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss


@dataclass(frozen=True)
class DistillAnchor(ClipRemoval):
    """CLIP + `anchor_weight` * distillation of the similarities within the batch (the loss of `DistillClipLoss` in
    open_clip). The teacher sees clean pairs alone, on which a poisoned model is right; a high rate and strong views
    then wear off what clean pairs do not need. The picture as it is and its augmented view are both encoded."""

    anchor_weight: Annotated[float, Field(gt=0)] = 1.0
    augmentation: Literal["auto", "strong"] = "strong"
    equal_captions: EqualCaptions = "soft"
    name: Literal["distill_anchor"] = "distill_anchor"

    needs_anchor: ClassVar[bool] = True

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "image_aug", "text")

    def step(self, setting: ClipSetting) -> ClipStep:
        gather = {"rank": setting.rank, "world_size": setting.world_size}

        def step_fn(batch: PairBatch) -> dict[str, Tensor]:
            anchor = setting.anchored(batch, ("image", "text"))
            outputs = setting.encode(batch, self.views)
            clip = clip_loss(
                outputs.features["image"],
                outputs.features["text"],
                outputs.logit_scale,
                batch.captions,
                equal_captions=self.equal_captions,
                **gather,
            )
            distilled = similarity_distillation(outputs, anchor, "image_aug", **gather)
            losses = {"clip_loss": clip["loss"], "distill_loss": self.anchor_weight * distilled}
            return losses | {"false_negatives": clip["false_negatives"], "loss": sum(losses.values())}

        return step_fn
