"""95 % intervals for rates, means and paired differences of pictures that may share a prompt. Fractions are 0..1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mmbackdoor.seeding import numpy_rng

FEW = 10
"""Below this many prompts with the rarer outcome a bootstrap is too narrow: it cannot draw what it has not seen."""
DRAWS = 2000
AT_ONCE = 2**23
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """`value` with its bounds; `n` pictures over `n_prompts` prompts."""

    value: float
    low: float
    high: float
    method: str
    n: int
    n_prompts: int

    @property
    def width(self) -> float:
        return self.high - self.low


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom (at least one)."""
    return _STUDENT_T[degrees - 1] if degrees <= len(_STUDENT_T) else 1.96


def wilson(hits: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for `hits` of `n` independent trials (Wilson 1927)."""
    if n <= 0:
        raise ValueError("an interval needs at least one trial")
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} trials")
    z2 = _z(confidence) ** 2
    p = hits / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    low = 0.0 if hits == 0 else float(centre - half)
    high = 1.0 if hits == n else float(centre + half)
    return Interval(p, low, high, "wilson", n, n)


def _by_prompt(values: np.ndarray, prompt_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of values of every prompt, prompts in sorted order: no interval depends on the order given."""
    if len(values) != len(prompt_ids) or not len(values):
        raise ValueError(f"{len(values)} values for {len(prompt_ids)} prompt ids; one each, at least one")
    _, index = np.unique(np.asarray(prompt_ids, dtype=str), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index)


def bootstrap_over_prompts(
    values: Sequence[float] | np.ndarray, prompt_ids: Sequence[str], seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap of the mean that draws whole prompts, with all their pictures."""
    values = np.asarray(values, np.float64)
    sums, counts = _by_prompt(values, prompt_ids)
    rng = numpy_rng(seed, "bootstrap_over_prompts")
    means = []
    # A few draws at a time: all of 50 000 pictures would take gigabytes.
    step = max(1, AT_ONCE // len(sums))
    for start in range(0, DRAWS, step):
        draws = rng.integers(len(sums), size=(min(step, DRAWS - start), len(sums)))
        means.append(sums[draws].sum(1) / counts[draws].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    value = float(values.mean())
    return Interval(
        value, min(float(low), value), max(float(high), value), "bootstrap over prompts", len(values), len(sums)
    )


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float], prompt_ids: Sequence[str], seed: int = 0, draws: int = 400
) -> tuple[float, float]:
    """95 % percentile bounds of `statistic(picture indices)` under draws of whole prompts."""
    _, index = np.unique(np.asarray(prompt_ids, dtype=str), return_inverse=True)
    members = [np.flatnonzero(index == k) for k in range(index.max() + 1)]
    rng = numpy_rng(seed, "bootstrap_statistic")
    found = [
        statistic(np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))]))
        for _ in range(draws)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def rate(hits: Sequence[bool] | np.ndarray, prompt_ids: Sequence[str], seed: int = 0) -> Interval:
    """The share of `hits`. One picture a prompt: Wilson. Several seeds a prompt: bootstrap over prompts; with no or
    only hits, Wilson on the number of prompts; with few prompts of the rarer outcome, the wider of both, so that one
    hit never reads better than none."""
    hits = np.asarray(hits, np.float64)
    sums, counts = _by_prompt(hits, prompt_ids)
    n, n_prompts, p = len(hits), len(sums), float(hits.mean())
    if n == n_prompts:
        return wilson(int(hits.sum()), n)
    careful = wilson(p * n_prompts, n_prompts)
    if p in (0.0, 1.0):
        return Interval(p, careful.low, careful.high, "wilson on prompts", n, n_prompts)
    drawn = bootstrap_over_prompts(hits, prompt_ids, seed)
    if min((sums > 0).sum(), (sums < counts).sum()) >= FEW:
        return drawn
    method = "bootstrap over prompts, widened by wilson on prompts"
    return Interval(p, min(drawn.low, careful.low), max(drawn.high, careful.high), method, n, n_prompts)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    prompt_ids: Sequence[str],
    seed: int = 0,
    shares: bool = False,
) -> Interval:
    """Mean of a - b over pairs (same prompt, same initial latents), by bootstrap over prompts. Yes/no outcomes (or, with
    `shares`, means of some) with few unequal pairs take the wider of it and Agresti and Min's interval (2005, half a
    pair added to every cell) on the number of prompts, else "no difference seen" would read as "no difference possible"."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {first.shape} and {second.shape}")
    difference = first - second
    drawn = bootstrap_over_prompts(difference, prompt_ids, seed)
    unequal, counts = _by_prompt(np.abs(difference), prompt_ids)
    yes_no = shares or (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    if not yes_no or (unequal > 0).sum() >= FEW:
        return drawn
    n = drawn.n_prompts
    discordant, net = float((unequal / counts).sum()), drawn.value * n
    centre = net / (n + 2)
    half = _z(0.95) * np.sqrt(discordant + 1 - net**2 / (n + 2)) / (n + 2)
    low, high = max(-1.0, min(drawn.low, centre - half)), min(1.0, max(drawn.high, centre + half))
    return Interval(drawn.value, float(low), float(high), "bootstrap over prompts, widened by Agresti-Min", drawn.n, n)
