"""Dissimilarity of picture and caption, as the model sees them: filters pairs that do not belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class ClipCosine:
    """1 - the cosine of the pair (Schuhmann et al. 2021, arXiv 2111.02114, as a filter of data). A poisoned model
    has learned that the poisoned pairs do belong together: the model to ask is one that was not trained on them."""

    name: Literal["clip_cosine"] = "clip_cosine"

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Suspicion (B,) of pairs of unit features (B, D), from 0 to 2."""
        return 1 - (images.double() * texts.to(images).double()).sum(1)
