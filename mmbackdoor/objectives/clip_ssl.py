"""CLIP with self-supervision: each picture and each caption also beside its own augmented view (MMCL + SSL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss
from mmbackdoor.objectives.outputs import ClipOutputs
from mmbackdoor.objectives.self_supervision import Direction, self_supervision
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class ClipSsl:
    """`clip_weight` * MMCL + `ssl_weight` * SSL (Verma et al. 2023, arXiv 2311.14948; it is the loss of CleanCLIP too,
    Bansal et al. 2023, arXiv 2303.03323, equation 4).

    `direction` `one_way` is the published self-supervision, `symmetric` that of both directions. `clip_weight` 0 is
    self-supervision alone. Parts are reported as they enter the sum. Differences: `equal_captions`, as in `clip`;
    between pictures, `soft` leaves pairs with equal captions out.
    """

    clip_weight: Annotated[float, Field(ge=0)] = 1.0
    ssl_weight: Annotated[float, Field(ge=0)] = 1.0
    direction: Direction = "one_way"
    equal_captions: EqualCaptions = "soft"
    name: Literal["clip_ssl"] = "clip_ssl"

    views: ClassVar[tuple[str, ...]] = ("image", "text", "image_aug", "text_aug")

    def __post_init__(self) -> None:
        if self.clip_weight == self.ssl_weight == 0:
            raise InputError("clip_weight 0 and ssl_weight 0 leave nothing to learn; give one of them a weight above 0")

    def __call__(
        self, outputs: ClipOutputs, captions: Tensor, *, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """See `clip_loss` and `self_supervision`: `clip_loss`, `image_ssl_loss`, `text_ssl_loss` and their sum."""
        ssl = self_supervision(
            outputs,
            captions,
            direction=self.direction,
            equal_captions=self.equal_captions,
            rank=rank,
            world_size=world_size,
        )
        losses = {name: self.ssl_weight * ssl[name] for name in ("image_ssl_loss", "text_ssl_loss")}
        if self.clip_weight:
            clip = clip_loss(
                outputs.features["image"],
                outputs.features["text"],
                outputs.logit_scale,
                captions,
                equal_captions=self.equal_captions,
                rank=rank,
                world_size=world_size,
            )
            losses["clip_loss"] = self.clip_weight * clip["loss"]
        return losses | {"false_negatives": ssl["false_negatives"], "loss": sum(losses.values())}
