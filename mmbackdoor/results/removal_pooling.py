"""Rates, means and paired differences of pictures that share prompts and seeds of a benchmark, with 95 % intervals.

A seed of a benchmark is a poisoning, a removal and an evaluation of its own; all seeds are measured on the same prompts.
So neither more seeds of the same prompts nor more prompts for the same seeds are as many trials: a prompt with its
pictures of all seeds is one cluster, and intervals are widened by a bootstrap that draws whole seeds as well as whole
prompts, the same prompts for every seed that it draws (Owen 2007, "The pigeonhole bootstrap", doi 10.1214/07-AOAS122; it
errs on the wide side).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mmbackdoor.evaluate.metrics.intervals import Interval, bootstrap_over_prompts, paired_difference, rate
from mmbackdoor.seeding import numpy_rng

DRAWS = 1000
Trial = tuple[str, str, int]
"""One picture: the seed (with several attacks, the attack too), the prompt, and the number of the picture of it."""
Trials = Mapping[Trial, float]


def pooled_rate(trials: Trials) -> Interval:
    """The share of ones among `trials` (at least one). With no or only ones: Wilson on the number of different prompts;
    with few prompts of the rarer outcome, nothing narrower than that, so that one hit never reads better than none."""
    return _widened(rate(list(trials.values()), _prompts(trials)), trials)


def pooled_mean(trials: Trials) -> Interval:
    return _widened(bootstrap_over_prompts(list(trials.values()), _prompts(trials)), trials)


def pooled_difference(now: Trials, was: Trials, shares: bool = False) -> Interval | None:
    """The mean of `now` - `was` over the pictures that both have (same prompt, same initial latents); else `None`.
    `shares`: each value is yes or no, or the mean of several."""
    both = {trial: now[trial] - was[trial] for trial in now if trial in was}
    if not both:
        return None
    values = ([of[trial] for trial in both] for of in (now, was))
    found = paired_difference(*values, _prompts(both), shares=shares)
    return _widened(found, both)


def _prompts(trials: Trials) -> list[str]:
    return [prompt for _, prompt, _ in trials]


def _widened(found: Interval, trials: Trials) -> Interval:
    seeds, of_seed = np.unique([seed for seed, _, _ in trials], return_inverse=True)
    if len(seeds) < 2:
        return found
    prompts, of_prompt = np.unique(_prompts(trials), return_inverse=True)
    sums, counts = np.zeros((2, len(seeds), len(prompts)))
    np.add.at(sums, (of_seed, of_prompt), list(trials.values()))
    np.add.at(counts, (of_seed, of_prompt), 1)
    rng = numpy_rng(0, "pooled over seeds")
    # (DRAWS, seeds) and (DRAWS, prompts): how often each is drawn.
    seed_weights = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), DRAWS)
    prompt_weights = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), DRAWS)
    totals, sizes = (np.einsum("ds,sp,dp->d", seed_weights, of, prompt_weights) for of in (sums, counts))
    # Seeds that were measured on prompts of their own can be drawn without any of them.
    low, high = np.quantile(totals[sizes > 0] / sizes[sizes > 0], [0.025, 0.975])
    if low >= found.low and high <= found.high:
        return found
    method = f"{found.method}, widened by a bootstrap over seeds"
    return replace(found, low=min(float(low), found.low), high=max(float(high), found.high), method=method)
