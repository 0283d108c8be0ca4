"""SigLIP: every picture and caption of the batch judged on its own, by a sigmoid, as matching or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmbackdoor.objectives.contrastive import EqualCaptions, siglip_loss
from mmbackdoor.objectives.outputs import ClipOutputs
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class SigLip:
    """Sigmoid loss over all B^2 pairs, divided by B, with a learned bias (Zhai et al. 2023, arXiv 2303.15343).

    Differences: `equal_captions`: `soft` takes pairs that share a caption as matching, `mask` leaves them out, `plain`,
    as not matching, is the paper's. The logit scale is kept in [1, 100], as in open_clip.
    """

    equal_captions: EqualCaptions = "soft"
    name: Literal["siglip"] = "siglip"

    views: ClassVar[tuple[str, ...]] = ("image", "text")
    logit_init: ClassVar[dict[str, float]] = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    """What a network with random weights starts from: the logarithm of its logit scale, and its bias (section 3.2)."""

    def __call__(
        self, outputs: ClipOutputs, captions: Tensor, *, rank: int = 0, world_size: int = 1
    ) -> dict[str, Tensor]:
        """See `siglip_loss`. Raises InputError for a model without a logit bias."""
        if outputs.logit_bias is None:
            raise InputError("siglip needs a model with a logit bias, and this one has none; take --objective clip")
        return siglip_loss(
            outputs.features["image"],
            outputs.features["text"],
            outputs.logit_scale,
            outputs.logit_bias,
            captions,
            equal_captions=self.equal_captions,
            rank=rank,
            world_size=world_size,
        )
