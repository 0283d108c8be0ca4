"""Perturb and recover: away from the poisoned model's features while CLIP's loss holds what is useful (Singh et al. 2024,
arXiv 2412.00727)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, distributed

from mmbackdoor.defenses.clip.removal import Augmentation, ClipRemoval, ClipStep
from mmbackdoor.models.clip_setting import ClipSetting, PairBatch
from mmbackdoor.objectives.anchor import feature_distance
from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss


@dataclass(frozen=True)
class Par(ClipRemoval):
    """L = CLIP - `perturb_weight` * (P_image + P_text), where P is the mean squared distance of unit features to those of
    the frozen model that came in, and counts only while it is below `threshold` (2 - 2 cosine; 2.15 is a cosine of
    -0.075). Published with 250 000 pairs, 2 epochs, batch 2048, a peak rate of 3e-6, weight decay 1e-4.

    Differences: both terms see the same view of a picture (the published code perturbs on augmented ones; for that,
    `augmentation`); each modality has its own switch, on the mean over all processes. With augmented views alone the
    running statistics of BatchNorm are those of augmented pictures: `--recalibrate_batches`, or `augmentation none`.
    """

    perturb_weight: Annotated[float, Field(gt=0)] = 0.5
    threshold: Annotated[float, Field(gt=0, le=4)] = 2.15
    augmentation: Augmentation = "auto"
    equal_captions: EqualCaptions = "soft"
    name: Literal["par"] = "par"

    needs_anchor: ClassVar[bool] = True

    @property
    def views(self) -> tuple[str, ...]:
        return ("image" if self.augmentation == "none" else "image_aug", "text")

    def step(self, setting: ClipSetting) -> ClipStep:
        picture = self.views[0]

        def step_fn(batch: PairBatch) -> dict[str, Tensor]:
            anchor = setting.anchored(batch, self.views)
            outputs = setting.encode(batch, self.views)
            clip = clip_loss(
                outputs.features[picture],
                outputs.features["text"],
                outputs.logit_scale,
                batch.captions,
                equal_captions=self.equal_captions,
                rank=setting.rank,
                world_size=setting.world_size,
            )
            losses, logged = {"clip_loss": clip["loss"]}, {"false_negatives": clip["false_negatives"]}
            for name, view in (("image", picture), ("text", "text")):
                distance = feature_distance(outputs.features[view], anchor.features[view])
                mean = _mean(distance.detach(), setting.world_size)
                losses[f"perturb_{name}_loss"] = -self.perturb_weight * distance * (mean < self.threshold)
                logged[f"distance_{name}"] = distance.detach()
            return losses | logged | {"loss": sum(losses.values())}

        return step_fn


def _mean(value: Tensor, world_size: int) -> Tensor:
    if world_size > 1:
        value = value.clone()
        distributed.all_reduce(value)
        value /= world_size
    return value
