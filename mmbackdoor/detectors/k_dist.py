"""Distance to the k-th neighbour: samples that lie far from all others are suspicious (Ramaswamy et al. 2000)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmbackdoor.detectors.neighbours import Among, neighbours_in_batch


@dataclass(frozen=True)
class KDist:
    """As used on CLIP by Huang et al. 2025 (arXiv 2502.01385): inside a random batch, k = 16. `among` says what
    neighbours are: other pictures, or pictures and captions."""

    k: Annotated[int, Field(ge=2)] = 16
    among: Among = "pairs"
    name: Literal["k_dist"] = "k_dist"

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Suspicion (B,) of a batch of unit features (B, D); higher is more suspicious. Raises `InputError` where the
        batch has no k neighbours."""
        return neighbours_in_batch(images, texts, self.k, self.among).radius[: len(images)]
