"""How far a trigger moves the pictures' embeddings as a whole: the 1-Wasserstein distance of two sets of vectors."""

from __future__ import annotations

import numpy as np


def assignment(cost: np.ndarray) -> np.ndarray:
    """The column of every row in the cheapest one-to-one assignment of `cost` (n, n): shortest augmenting paths
    (Jonker and Volgenant 1987), O(n^3), a second for n = 256."""
    n = len(cost)
    if cost.shape != (n, n):
        raise ValueError(f"an assignment needs a square matrix, not {cost.shape}")
    row_price, column_price = np.zeros(n), np.zeros(n)
    row_of = np.full(n, -1)
    for row in range(n):
        # A tree of cheapest alternating paths grows from `row` until it meets a free column.
        distance, before = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        at, last, reached = row, -1, 0.0
        while True:
            through = reached + cost[at] - row_price[at] - column_price
            shorter = ~done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], last
            last = int(np.where(done, np.inf, distance).argmin())
            reached = distance[last]
            if row_of[last] < 0:
                break
            done[last] = True
            at = row_of[last]
        slack = reached - distance[done]
        row_price[row_of[done]] += slack
        column_price[done] -= slack
        row_price[row] += reached
        while last >= 0:
            row_of[last] = row if before[last] < 0 else row_of[before[last]]
            last = before[last]
    columns = np.empty(n, dtype=np.int64)
    columns[row_of] = np.arange(n)
    return columns


def w1(first: np.ndarray, second: np.ndarray) -> float:
    """W1 of two sets of as many vectors (n, D) each, exact: the mean Euclidean distance under the best pairing.

    Of unit vectors it lies in [0, 2]. The same pictures with and without a trigger give 0 where it does nothing, and
    at most their mean distance pair by pair.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"sets of equal size are compared, not {first.shape} and {second.shape}")
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    cost = np.sqrt(np.maximum(squares, 0))
    # Cancellation leaves 1e-8 where the same vector stands on both sides.
    cost[squares < 1e-12] = 0
    return float(cost[np.arange(len(cost)), assignment(cost)].mean())
