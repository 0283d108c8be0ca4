"""Distances between two sets of pictures by a judge's features: KID and the Frechet distance.

Both follow features, not prompts: the prototype's Frechet distance *improved* with a patch in every picture. Read them
beside adherence, never alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmbackdoor.evaluate.metrics.intervals import Interval, student_t
from mmbackdoor.seeding import numpy_rng

BLOCK, SMALLEST_BLOCK = 25, 10
FEWEST_BLOCKS, MOST_BLOCKS = 3, 10
"""Prompts of a block of KID, and how many blocks an interval has."""
MOST_PAIRS = 1 << 24
"""Of pictures whose likeness is held at a time (128 MB)."""
INCEPTION = "inception"


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(
    features: torch.Tensor,
    reference: torch.Tensor,
    prompts: Sequence[str] | None = None,
    reference_prompts: Sequence[str] | None = None,
) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4):
    about 0, below it too, for two samples of one distribution. Scale the features to unit variance before comparing
    numbers of different feature extractors.

    With the prompt that each picture was asked for, pairs of pictures that share one are left out of all three means:
    drawn from the same latents, or of one prompt, they are alike for reasons of their own.
    """
    x, y = features.double(), reference.double()
    asked, asked_there = _numbered(len(x), len(y), prompts, reference_prompts)
    if min(len(np.unique(asked)), len(np.unique(asked_there))) < 2:
        raise ValueError(f"KID needs at least two pictures on each side, of different prompts, not {len(x)} and {len(y)}")
    return _mean(x, x, asked, asked) + _mean(y, y, asked_there, asked_there) - 2 * _mean(x, y, asked, asked_there)


def kid_interval(
    features: torch.Tensor,
    reference: torch.Tensor,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    reference_prompts: Sequence[str] | None = None,
) -> Interval | None:
    """KID of the whole sets, with Student's t over that of disjoint blocks of prompts; `None` with fewer than 30 prompts
    on either side. Bounds of few blocks are wide: so little is known then. (A bootstrap of pictures would draw some
    twice and count their likeness to themselves.)"""
    asked, asked_there = _numbered(len(features), len(reference), prompts, reference_prompts)
    fewest = min(len(np.unique(asked)), len(np.unique(asked_there)))
    if fewest < SMALLEST_BLOCK * FEWEST_BLOCKS:
        return None
    blocks = min(MOST_BLOCKS, max(FEWEST_BLOCKS, fewest // BLOCK))
    rng = numpy_rng(seed, "kid blocks")
    # A prompt of both sides is in the same block of both.
    every = np.unique(asked_there)
    order = [*rng.permutation(np.intersect1d(asked, every)), *rng.permutation(np.setdiff1d(asked, every))]
    block_of = {prompt: number % blocks for number, prompt in enumerate(order)}
    block_of |= {prompt: number % blocks for number, prompt in enumerate(rng.permutation(np.setdiff1d(every, asked)))}
    here, there = (np.array([block_of[prompt] for prompt in of]) for of in (asked, asked_there))
    found = [
        kid(features[here == k], reference[there == k], list(map(str, asked[here == k])),
            list(map(str, asked_there[there == k])))
        for k in range(blocks)
    ]  # fmt: skip
    value = kid(features, reference, prompts, reference_prompts)
    half = student_t(blocks - 1) * float(np.std(found, ddof=1)) / blocks**0.5
    return Interval(value, value - half, value + half, f"Student's t over {blocks} blocks of prompts", len(features),
                    len(np.unique(asked)))  # fmt: skip


def _numbered(
    n: int, m: int, prompts: Sequence[str] | None, reference_prompts: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """A number for each picture's prompt, the same for equal ones; where none are given, each picture has its own."""
    first = list(prompts) if prompts is not None else [f"own {k}" for k in range(n)]
    second = list(reference_prompts) if reference_prompts is not None else [f"other {k}" for k in range(m)]
    _, index = np.unique([*first, *second], return_inverse=True)
    return index[:n], index[n:]


def _mean(x: torch.Tensor, y: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> float:
    """The mean of the kernel over the pairs of different prompts, some rows at a time: a matrix of 50 000 x 50 000 takes
    20 GB."""
    total, count = 0.0, 0
    step = max(1, MOST_PAIRS // len(y))
    for start in range(0, len(x), step):
        same = torch.from_numpy(rows[start : start + step, None] == columns[None, :]).to(x.device)
        total += float(_kernel(x[start : start + step], y).masked_fill_(same, 0).sum())
        count += same.numel() - int(same.sum())
    return total / count


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
