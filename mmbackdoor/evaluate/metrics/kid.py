"""Distances between two sets of pictures by a judge's features: KID and the Frechet distance.

Both follow features, not prompts: the prototype's Frechet distance *improved* with a patch in every picture. Read them
beside adherence, never alone.
"""

from __future__ import annotations

import numpy as np
import torch

from mmbackdoor.evaluate.metrics.intervals import DRAWS, Interval
from mmbackdoor.seeding import numpy_rng

BLOCK = 50
INCEPTION = "inception"


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4):
    about 0, below it too, for two samples of one distribution. Scale the features to unit variance before comparing
    numbers of different feature extractors."""
    x, y = features.double(), reference.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least two pictures on each side, not {n} and {m}")
    xx, yy = _kernel(x, x), _kernel(y, y)
    within = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * _kernel(x, y).mean())


def kid_interval(features: torch.Tensor, reference: torch.Tensor, seed: int = 0, block: int = BLOCK) -> Interval:
    """KID of the whole sets with a bootstrap over disjoint blocks: drawing single pictures twice would count their
    likeness to themselves. With fewer than four blocks the bounds come from halves and are rough."""
    value = kid(features, reference)
    n, m = len(features), len(reference)
    rng = numpy_rng(seed, "kid blocks")
    blocks = max(2, min(n, m) // block) if min(n, m) >= 4 else 1
    if blocks == 1:
        return Interval(value, value, value, "none: fewer than four pictures", n, n)
    parts = zip(np.array_split(rng.permutation(n), blocks), np.array_split(rng.permutation(m), blocks), strict=True)
    found = np.array([kid(features[a], reference[b]) for a, b in parts])
    means = found[rng.integers(blocks, size=(DRAWS, blocks))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value), f"bootstrap over {blocks} blocks", n, n)


def frechet(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017, eq. 6)."""
    x, y = features.double(), reference.double()
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the Frechet distance needs at least two pictures on each side, not {len(x)} and {len(y)}")
    first, second = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return max(0.0, float(means + first.trace() + second.trace() - 2 * cross))


def frechet_name(features: str) -> str:
    """`fid` is the name of the distance in Inception's features only."""
    return "fid" if INCEPTION in features.lower() else "frechet"
