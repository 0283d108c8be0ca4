"""Dimensionality-aware outliers: density ratios weighted by the local intrinsic dimension (Anderberg et al. 2024, arXiv
2401.05453; on CLIP: Huang et al. 2025, arXiv 2502.01385)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.detectors.neighbours import Among, local_dimension, neighbours_in_batch, ratios


@dataclass(frozen=True)
class DAO:
    """The mean over the k neighbours o of (radius / radius of o) ^ (local dimension at o), inside a random batch. `among`
    says what neighbours are: other pictures, or pictures and captions.

    Differences: the logarithm of that mean is given, which cannot overflow and ranks alike.
    """

    k: Annotated[int, Field(ge=2)] = 16
    among: Among = "pairs"
    name: Literal["dao"] = "dao"

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Suspicion (B,) of a batch of unit features (B, D); higher is more suspicious, 0 is like its neighbourhood.
        Raises `InputError` where the batch has no k neighbours."""
        found = neighbours_in_batch(images, texts, self.k, self.among)
        dimensions = local_dimension(found.distances)[found.indices]
        return ((dimensions * ratios(found)).logsumexp(1) - math.log(self.k))[: len(images)]
