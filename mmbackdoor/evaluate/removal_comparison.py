"""Removals of one benchmark against each other, picture by picture: the lines of `comparisons.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mmbackdoor.evaluate.removal_points import Seen, Values
from mmbackdoor.evaluate.summary import MEANS, RATES
from mmbackdoor.results.removal_benchmark import UTILITIES
from mmbackdoor.results.removal_comparison import Comparison
from mmbackdoor.results.removal_pooling import Trial, pooled_difference

MEASURES = (("asr", "triggered"), *((metric, of) for metric in UTILITIES for of in ("clean", "triggered")))
Ways = dict[tuple[str, str], dict[int, Values]]
"""(attack, seed) -> step of the removal -> what was measured then."""


def comparisons(found: Sequence[Seen], against: Mapping[str, str]) -> list[Comparison]:
    """Each removal in `against` minus the one that it names, over all seeds: for each attack and for all together,
    after each step that was measured, averaged over those before the end, and at the end.

    Only pictures that both have count (same attack, seed, prompt, initial latents). Where a removal has already ended
    it stays as it ended.
    """
    by_situation: dict[str, dict[str, Ways]] = {}
    for one in found:
        removals = by_situation.setdefault(one.where.situation, {})
        steps = removals.setdefault(one.where.removal, {}).setdefault((one.where.attack, str(one.seed)), {})
        steps[one.where.step] = one.values
    between = tuple(sorted({one.where.step for one in found if not one.where.final}))
    moments = [(), *((step,) for step in between), *([between] if len(between) > 1 else [])]
    made = []
    for situation, removals in by_situation.items():
        for name, other in against.items():
            for after in [()] if situation else moments:
                if name in removals and other in removals:
                    facts = {"removal": name, "against": other, "situation": situation}
                    made += _lines(removals[name], removals[other], after=after, **facts)
    return made


def _lines(now: Ways, was: Ways, *, after: tuple[int, ...], **facts: str) -> Iterator[Comparison]:
    attacks = list(dict.fromkeys(attack for attack, _ in now))
    for chosen in ([None] if len(attacks) > 1 else []) + attacks:
        cells = [cell for cell in now if cell in was and chosen in (None, cell[0])]
        for metric, condition in MEASURES:
            sides = [_trials({cell: of[cell] for cell in cells}, (metric, condition), after) for of in (now, was)]
            change = pooled_difference(*sides, shares=metric in RATES)
            if change is not None:
                yield Comparison(
                    attack=chosen, after=after, metric=metric, condition=condition, value=change.value,
                    low=change.low, high=change.high, ci_method=change.method, n=change.n,
                    n_prompts=change.n_prompts, seeds=len({seed for _, seed in cells}),
                    unit=MEANS.get(metric, "fraction"), **facts,
                )  # fmt: skip


def _trials(
    ways: Mapping[tuple[str, str], Mapping[int, Values]], key: tuple[str, str], after: tuple[int, ...]
) -> dict[Trial, float]:
    """Each picture's value, the mean over the steps `after`; a picture that lacks one of them is left out."""
    trials = {}
    for (attack, seed), of in ways.items():
        moments = [of[min(step, max(of))].get(key, {}) for step in after or (max(of),)]
        for place in set.intersection(*map(set, moments)):
            values = [moment[place] for moment in moments]
            trials[f"{attack}, {seed}", *place] = sum(values) / len(values)
    return trials
