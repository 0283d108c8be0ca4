"""SLIP: CLIP's objective and SimCLR between two augmented views of each picture, behind a projection head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss
from mmbackdoor.objectives.outputs import PROJECTION, ClipOutputs
from mmbackdoor.objectives.self_supervision import simclr_loss


@dataclass(frozen=True)
class Slip:
    """L_CLIP + `ssl_weight` * L_SimCLR (Mu et al. 2021, arXiv 2112.12750, algorithm 1). `projection` are the widths of
    the head's layers; the head is thrown away after the training.

    Differences: the views are as strong as pretrain_clip's `augmentation` (`strong`: the paper's kind, with crops; the default
    `auto` has none); the head starts from the embedding, not from what lies before its last projection; the picture beside
    the caption is not cropped at random; `equal_captions`, as in `clip`, and between pictures `soft` leaves pairs with
    equal captions out. Parts are reported as they enter the sum.
    """

    ssl_weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 0.1
    projection: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (4096, 4096, 256)
    equal_captions: EqualCaptions = "soft"
    name: Literal["slip"] = "slip"

    views: ClassVar[tuple[str, ...]] = ("image", "text", "image_aug", "image_aug2")

    def __call__(
        self, outputs: ClipOutputs, captions: Tensor, *, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """See `clip_loss` and `simclr_loss`: `clip_loss`, `simclr_loss` and their sum."""
        losses = clip_loss(
            outputs.features["image"],
            outputs.features["text"],
            outputs.logit_scale,
            captions,
            equal_captions=self.equal_captions,
            rank=rank,
            world_size=world_size,
        )
        simclr = self.ssl_weight * simclr_loss(
            outputs.features[f"{PROJECTION}image_aug"],
            outputs.features[f"{PROJECTION}image_aug2"],
            self.temperature,
            captions,
            equal_captions=self.equal_captions,
            rank=rank,
            world_size=world_size,
        )
        return losses | {"simclr_loss": simclr, "loss": losses["loss"] + simclr}
