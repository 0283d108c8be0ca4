"""Rates, means and paired differences of pictures that share prompts and seeds of a benchmark, with 95 % intervals.

A seed of a benchmark is a poisoning, a removal and an evaluation of its own; a prompt is one cluster in each of them.
With few seeds that differ, clusters alone read surer than they are: intervals are widened by a bootstrap that draws
whole seeds first, and then prompts within each. What never or hardly ever happened no bootstrap can draw: there counts
how many different prompts were tried, since more seeds of the same ones say little about others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mmbackdoor.evaluate.metrics.intervals import (
    FEW,
    Interval,
    bootstrap_over_prompts,
    paired_difference,
    rate,
    wilson,
)
from mmbackdoor.seeding import numpy_rng

DRAWS = 1000
Trial = tuple[str, str, int]
"""One picture: the seed (with several attacks, the attack too), the prompt, and the number of the picture of it."""
Trials = Mapping[Trial, float]


def pooled_rate(trials: Trials) -> Interval:
    """The share of ones among `trials` (at least one). With no or only ones: Wilson on the number of different prompts;
    with few prompts of the rarer outcome, nothing narrower than that, so that one hit never reads better than none."""
    found = rate(list(trials.values()), _clusters(trials))
    rarer = 1.0 if found.value < 0.5 else 0.0
    few = len({prompt for (_, prompt, _), value in trials.items() if value == rarer}) < FEW
    prompts = len(_prompts(trials))
    # Of one seed's prompts all this has been done.
    if few and prompts < found.n_prompts:
        careful = wilson(found.value * prompts, prompts)
        low, high = min(careful.low, found.low), max(careful.high, found.high)
        never = found.value in (0.0, 1.0)
        method = "wilson on prompts" if never else f"{found.method}, widened by wilson on prompts"
        found = replace(found, low=low, high=high, method=method)
    return _widened(found, trials)


def pooled_mean(trials: Trials) -> Interval:
    return _widened(bootstrap_over_prompts(list(trials.values()), _clusters(trials)), trials)


def pooled_difference(now: Trials, was: Trials) -> Interval | None:
    """The mean of `now` - `was` over the pictures that both have (same prompt, same initial latents); else `None`."""
    both = {trial: now[trial] - was[trial] for trial in now if trial in was}
    if not both:
        return None
    found = paired_difference([now[trial] for trial in both], [was[trial] for trial in both], _clusters(both))
    return _widened(found, both)


def _prompts(trials: Trials) -> set[str]:
    return {prompt for _, prompt, _ in trials}


def _clusters(trials: Trials) -> list[str]:
    return [f"{seed} {prompt}" for seed, prompt, _ in trials]


def _widened(found: Interval, trials: Trials) -> Interval:
    found = replace(found, n_prompts=len(_prompts(trials)))
    seeds = sorted({seed for seed, _, _ in trials})
    if len(seeds) < 2:
        return found
    rng = numpy_rng(0, "pooled over seeds")
    drawn = np.stack([_draws({key: value for key, value in trials.items() if key[0] == seed}, rng) for seed in seeds])
    chosen = rng.integers(len(seeds), size=(DRAWS, len(seeds)))
    # A seed that is drawn twice brings two draws of its prompts.
    rows = (np.arange(DRAWS)[:, None] + np.arange(len(seeds)) * (DRAWS // len(seeds))) % DRAWS
    totals = drawn[chosen, rows].sum(1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    if low >= found.low and high <= found.high:
        return found
    method = f"{found.method}, widened by a bootstrap over seeds"
    return replace(found, low=min(float(low), found.low), high=max(float(high), found.high), method=method)


def _draws(trials: Trials, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS, 2) sums and counts of one seed's values under draws of its prompts."""
    prompts, index = np.unique([prompt for _, prompt, _ in sorted(trials)], return_inverse=True)
    values = np.array([trials[trial] for trial in sorted(trials)], np.float64)
    each = np.stack([np.bincount(index, weights=values), np.bincount(index)], 1)
    return each[rng.integers(len(prompts), size=(DRAWS, len(prompts)))].sum(1)
