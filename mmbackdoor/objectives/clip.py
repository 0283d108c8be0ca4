"""CLIP's own objective: pictures and captions of a pair together, all others of the batch apart (MMCL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmbackdoor.objectives.contrastive import EqualCaptions, clip_loss
from mmbackdoor.objectives.outputs import ClipOutputs


@dataclass(frozen=True)
class Clip:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3). Differences:
    `equal_captions` says what becomes of pairs that share a caption; `plain`, as negatives, is the paper's."""

    equal_captions: EqualCaptions = "soft"
    name: Literal["clip"] = "clip"

    views: ClassVar[tuple[str, ...]] = ("image", "text")
    """What of each pair is encoded, in one forward pass."""

    def __call__(
        self, outputs: ClipOutputs, captions: Tensor, *, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """`outputs` has every view of `views`; see `clip_loss` for the rest."""
        return clip_loss(
            outputs.features["image"],
            outputs.features["text"],
            outputs.logit_scale,
            captions,
            equal_captions=self.equal_captions,
            rank=rank,
            world_size=world_size,
        )
