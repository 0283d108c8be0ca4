"""How well scores tell two groups apart, whatever the threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a score of `positive` is above one of `negative`, ties counting half (Hanley and McNeil 1982).

    Raises `ValueError` where a group is empty.
    """
    if not len(positive) or not len(negative):
        raise ValueError("both groups need at least one score")
    below = np.sort(np.asarray(negative, np.float64))
    values = np.asarray(positive, np.float64)
    wins = np.searchsorted(below, values, "left") + np.searchsorted(below, values, "right")
    return float(wins.mean() / (2 * len(below)))
