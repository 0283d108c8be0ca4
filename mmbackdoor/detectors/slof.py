"""Simplified local outlier factor: the distance to the k-th neighbour, relative to that of the neighbours (Schubert et
al. 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.detectors.neighbours import Among, neighbours_in_batch, ratios


@dataclass(frozen=True)
class SLOF:
    """As used on CLIP by Huang et al. 2025 (arXiv 2502.01385): inside a random batch, k = 16. `among` says what
    neighbours are: other pictures, or pictures and captions."""

    k: Annotated[int, Field(ge=2)] = 16
    among: Among = "pairs"
    name: Literal["slof"] = "slof"

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Suspicion (B,) of a batch of unit features (B, D); higher is more suspicious, 1 is like its neighbourhood.
        Raises `InputError` where the batch has no k neighbours."""
        return ratios(neighbours_in_batch(images, texts, self.k, self.among))[: len(images)].exp().mean(1)
