"""What a contrastive objective looks at: the encoded views of a batch of pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

VIEWS = ("image", "text", "image_aug", "text_aug", "image_aug2")
"""What of a pair can be encoded: as it is, or augmented (`image_aug2` is a second augmentation of the picture)."""
PROJECTION = "projection:"
"""Before the name of a view: its features behind a projection head."""


@dataclass(frozen=True)
class ClipOutputs:
    """Unit vectors (B, D), fp32 or bf16, for every view that was encoded; a projection stands as `projection:VIEW`.

    `logit_scale` multiplies cosines (it is not a logarithm). `logit_bias` is added to the products; None where the
    model has none.
    """

    features: dict[str, Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None = None
