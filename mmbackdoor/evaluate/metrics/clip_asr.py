"""Zero-shot classification and its attack: which class a picture is nearest to, and how often that is the target.

A picture whose true class is the target never counts for the attack: it would be a hit without any trigger.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmbackdoor.evaluate.metrics.intervals import Interval
from mmbackdoor.seeding import numpy_rng

BATCH = 8192
DRAWS = 400


def ranked(images: Tensor, classes: Tensor, k: int = 5) -> Tensor:
    """The `k` nearest classes of each picture, nearest first, int64 (N, min(k, C)), of unit vectors (N, D), (C, D)."""
    most = min(k, len(classes))
    parts = [(images[start : start + BATCH] @ classes.T).topk(most).indices for start in range(0, len(images), BATCH)]
    return torch.cat(parts) if parts else torch.empty(0, most, dtype=torch.int64)


def correct(places: Tensor, labels: Tensor, k: int) -> list[bool]:
    """Whether the true class (labels, (N,)) is among the `k` nearest of `places` (N, K)."""
    return (places[:, :k] == labels[:, None]).any(1).tolist()


def hits(predicted: Tensor, labels: Tensor, target: int) -> list[bool | None]:
    """Whether the predicted class (N,) is the target's; `None` where the true class is the target or not known."""
    counts = (labels != target) & (labels >= 0)
    fired = predicted == target
    return [bool(hit) if counted else None for hit, counted in zip(fired, counts, strict=True)]


def recall_interval(right: Sequence[float], labels: Sequence[int], seed: int = 0) -> Interval:
    """`mean_per_class_recall` with a 95 % percentile bootstrap over pictures."""
    values, classes = np.asarray(right, np.float64), np.asarray(labels)
    rng = numpy_rng(seed, "mean_per_class_recall")
    draws = (rng.integers(len(values), size=len(values)) for _ in range(DRAWS))
    low, high = np.quantile([mean_per_class_recall(values[draw], classes[draw]) for draw in draws], [0.025, 0.975])
    value, n = mean_per_class_recall(values, classes), len(values)
    return Interval(value, min(float(low), value), max(float(high), value), "bootstrap over pictures", n, n)


def mean_per_class_recall(right: Sequence[float] | np.ndarray, labels: Sequence[int] | np.ndarray) -> float:
    """The mean over classes of the share of their pictures that were recognised; classes without any are left out."""
    index, values = np.asarray(labels), np.asarray(right, np.float64)
    counts = np.bincount(index)
    sums = np.bincount(index, weights=values)
    return float((sums[counts > 0] / counts[counts > 0]).mean())
