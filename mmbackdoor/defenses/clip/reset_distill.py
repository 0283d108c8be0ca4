"""Our own removal: a network shrunk towards a random beginning learns anew, from what the incoming model makes of clean
pairs, to see through whatever is laid over a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.defenses.clip.removal import ClipRemoval, ClipStep
from mmbackdoor.models.clip_init import shrink_and_perturb
from mmbackdoor.models.clip_setting import ClipSetting, PairBatch
from mmbackdoor.objectives.anchor import feature_distance
from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss

if TYPE_CHECKING:
    from mmbackdoor.models.clip import ClipModel


@dataclass(frozen=True)
class ResetDistill(ClipRemoval):
    """weights = `keep` * weights + (1 - `keep`) * a fresh random draw, once; then CLIP's loss, and the features of the
    picture, of its augmented view and of the caption are drawn to those that the incoming model gives to the picture and
    the caption as they are.

    The incoming model is only ever asked about clean pairs, so it teaches nothing of the trigger, and what the weights
    still know of it is weakened before; features of every pair are a richer signal than which pairs match, so little
    data will do. With BatchNorm give `--recalibrate_batches`: after a short run its running statistics are not those of
    the new weights. Shrinking: Ash and Adams 2020 (arXiv 1910.08475).
    """

    keep: Annotated[float, Field(ge=0, le=1)] = 0.5
    distill_weight: Annotated[float, Field(gt=0)] = 5.0
    augmentation: Literal["auto", "strong"] = "strong"
    equal_captions: EqualCaptions = "soft"
    name: Literal["reset_distill"] = "reset_distill"

    needs_anchor: ClassVar[bool] = True

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "image_aug", "text")

    def edit(self, clip: ClipModel, seed: int) -> None:
        shrink_and_perturb(clip, self.keep, 1 - self.keep, seed)

    def step(self, setting: ClipSetting) -> ClipStep:
        def step_fn(batch: PairBatch) -> dict[str, Tensor]:
            anchor = setting.anchored(batch, ("image", "text")).features
            outputs = setting.encode(batch, self.views)
            clip = clip_loss(
                outputs.features["image"],
                outputs.features["text"],
                outputs.logit_scale,
                batch.captions,
                equal_captions=self.equal_captions,
                rank=setting.rank,
                world_size=setting.world_size,
            )
            targets = {"image": anchor["image"], "image_aug": anchor["image"], "text": anchor["text"]}
            losses = {
                f"distill_{view}_loss": self.distill_weight / 3 * feature_distance(outputs.features[view], target)
                for view, target in targets.items()
            }
            losses["clip_loss"] = clip["loss"]
            return losses | {"false_negatives": clip["false_negatives"], "loss": sum(losses.values())}

        return step_fn
