"""CyCLIP: CLIP's objective and consistent geometry, within each modality and across the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss, cyclic_losses
from mmbackdoor.objectives.outputs import ClipOutputs


@dataclass(frozen=True)
class CyClip:
    """L_CLIP + `in_modal_weight` * L_I-cyclic + `cross_modal_weight` * L_C-cyclic (Goel et al. 2022, arXiv 2205.14459,
    equation 5).

    Consistency holds for every two pairs, whatever their captions, so `equal_captions` concerns L_CLIP alone. Parts are
    reported as they enter the sum. Differences: similarities of all processes count, each with its gradient.
    """

    in_modal_weight: Annotated[float, Field(ge=0)] = 0.25
    cross_modal_weight: Annotated[float, Field(ge=0)] = 0.25
    equal_captions: EqualCaptions = "soft"
    name: Literal["cyclip"] = "cyclip"

    views: ClassVar[tuple[str, ...]] = ("image", "text")

    def __call__(
        self, outputs: ClipOutputs, captions: Tensor, *, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """See `clip_loss` and `cyclic_losses`: `clip_loss`, `in_modal_loss`, `cross_modal_loss` and their sum."""
        image, text = outputs.features["image"], outputs.features["text"]
        losses = clip_loss(
            image,
            text,
            outputs.logit_scale,
            captions,
            equal_captions=self.equal_captions,
            rank=rank,
            world_size=world_size,
        )
        in_modal, cross_modal = cyclic_losses(image, text, world_size)
        in_modal, cross_modal = self.in_modal_weight * in_modal, self.cross_modal_weight * cross_modal
        total = losses["loss"] + in_modal + cross_modal
        return losses | {"in_modal_loss": in_modal, "cross_modal_loss": cross_modal, "loss": total}
