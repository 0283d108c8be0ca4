"""The ASR-accuracy frontier of one poisoned model: what cleaning reached, and what a defender would have picked.

A single learning rate is luck: published cleaners succeed on 2 of 24. So a cleaner is judged by all its checkpoints
over a grid, and by the one that a written rule picks. All rates are fractions in [0, 1]; "points" are 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Annotated, Literal, Protocol

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.evaluate.metrics.intervals import student_t

ASR_LEVELS = (0.05, 0.10, 0.20)
LOSSES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Sight:
    """What a defender without the trigger can see of a checkpoint: nothing else reaches a blind rule.

    `utility` is accuracy on clean data that is kept for selection, `drift` how far the embeddings of that data moved
    from the poisoned model's (1 - mean cosine), `step` that of the training, `run` names its grid entry.
    """

    run: str
    step: int
    utility: float
    drift: float


@dataclass(frozen=True)
class Point:
    """One checkpoint as the evaluation, which knows the trigger, measured it, and what a defender sees of it."""

    asr: float
    accuracy: float
    seen: Sight


@dataclass(frozen=True)
class LargestDrift:
    """The checkpoint that moved farthest from the poisoned model among those that lost at most `budget` of its
    utility; among none, the one with the best utility. Cleaning that changes little removes little."""

    name: Literal["largest_drift"] = "largest_drift"
    budget: Annotated[float, Field(ge=0, le=1), Doc("accuracy on clean data that may be lost, as a fraction")] = 0.02

    @property
    def words(self) -> str:
        return (
            f"of the checkpoints that lost at most {100 * self.budget:g} points of accuracy on clean pictures kept for "
            "selection, the one whose embeddings of them moved farthest from the poisoned model's; where none lost so "
            "little, the one with the best accuracy on them."
        )

    def admits(self, one: Sight, utility: float) -> bool:
        return one.utility >= utility - self.budget - 1e-9

    def __call__(self, seen: Sequence[Sight], utility: float) -> Sight:
        kept = [one for one in seen if self.admits(one, utility)]
        return max(kept, key=lambda one: one.drift) if kept else max(seen, key=lambda one: one.utility)


@dataclass(frozen=True)
class BestUtility:
    """The checkpoint with the best utility, the later one of equals: what one picks who looks at accuracy alone."""

    name: Literal["best_utility"] = "best_utility"

    @property
    def words(self) -> str:
        return "the checkpoint with the best accuracy on clean pictures kept for selection, the later one of equals."

    def admits(self, one: Sight, utility: float) -> bool:
        return True

    def __call__(self, seen: Sequence[Sight], utility: float) -> Sight:
        return max(seen, key=lambda one: (one.utility, one.step))


class Rule(Protocol):
    """A blind rule: picks one of what a defender sees of checkpoints, given the utility of the poisoned model."""

    def __call__(self, seen: Sequence[Sight], utility: float) -> Sight: ...

    def admits(self, one: Sight, utility: float) -> bool:
        """Whether `one` is what the rule asks for, and not only the best of what is there."""
        ...


Blind = Annotated[LargestDrift | BestUtility, Field(discriminator="name")]


def accuracy_at(points: Sequence[Point], most: float) -> float | None:
    """The best accuracy among the points with ASR <= `most`; None where there is none."""
    return max((point.accuracy for point in points if point.asr <= most + 1e-9), default=None)


def lowest_asr(points: Sequence[Point], accuracy: float, loss: float) -> float | None:
    """The lowest ASR among the points that lost at most `loss` of the poisoned model's `accuracy`; None: none did."""
    return min((point.asr for point in points if point.accuracy >= accuracy - loss - 1e-9), default=None)


def area(points: Sequence[Point], start: Point) -> float:
    """The share of the accuracy that is kept, averaged over every level of ASR from 0 to the poisoned model's.

    At a level counts the best point with that ASR or less, or 0. Cleaning that does nothing gets 0, a perfect one 1,
    and one that raises accuracy more than 1.
    """
    if start.asr <= 0 or start.accuracy <= 0:
        return 0.0
    total, best, level = 0.0, 0.0, 0.0
    for point in sorted(points, key=lambda point: point.asr):
        if point.asr >= start.asr:
            break
        total += best * (point.asr - level)
        best, level = max(best, point.accuracy), point.asr
    return (total + best * (start.asr - level)) / (start.asr * start.accuracy)


def share_of_runs(
    points: Sequence[Point], accuracy: float, most: float = 0.05, loss: float = 0.05, failed: int = 0
) -> float:
    """The share of runs with a checkpoint of ASR <= `most` that lost at most `loss` of `accuracy`.

    `failed` runs, which broke off (a loss that is not finite), are runs without success.
    """
    runs = len({point.seen.run for point in points}) + failed
    good = {p.seen.run for p in points if p.asr <= most + 1e-9 and p.accuracy >= accuracy - loss - 1e-9}
    return len(good) / runs if runs else 0.0


def oracle(points: Sequence[Point], most: float = 0.05) -> Point:
    """The best accuracy with ASR <= `most`, else the lowest ASR. It looks at the trigger: a bound, no result."""
    reached = [point for point in points if point.asr <= most + 1e-9]
    if reached:
        return max(reached, key=lambda point: (point.accuracy, -point.asr))
    return min(points, key=lambda point: (point.asr, -point.accuracy))


def blind(points: Sequence[Point], start: Sight, rule: Rule) -> Point:
    """The point that `rule` picks out of what a defender sees."""
    chosen = rule([point.seen for point in points], start.utility)
    return next(point for point in points if point.seen is chosen)


@dataclass(frozen=True)
class Frontier:
    """The numbers of one cleaner on one poisoned model. `accuracy_at` goes by `ASR_LEVELS`, `lowest_asr` by `LOSSES`;
    None where no checkpoint got there. Where every run broke off there is nothing to pick, and nothing was removed:
    `oracle` and `blind` are None, `area` and `succeeded` 0. `admitted`: whether `blind` is what the rule asks for."""

    start: Point
    checkpoints: int
    runs: int
    accuracy_at: tuple[float | None, ...]
    lowest_asr: tuple[float | None, ...]
    area: float
    succeeded: float
    oracle: Point | None
    blind: Point | None
    admitted: bool


def frontier(points: Sequence[Point], start: Point, rule: Rule, failed: int = 0) -> Frontier:
    """The frontier of `points`, all cleaned from the model `start`; `failed` more runs broke off. There is at least one
    point or such run."""
    if not points and not failed:
        raise ValueError("a frontier needs at least one checkpoint, or a run that broke off")
    pick = blind(points, start.seen, rule) if points else None
    return Frontier(
        start=start,
        checkpoints=len(points),
        runs=len({point.seen.run for point in points}) + failed,
        accuracy_at=tuple(accuracy_at(points, level) for level in ASR_LEVELS),
        lowest_asr=tuple(lowest_asr(points, start.accuracy, loss) for loss in LOSSES),
        area=area(points, start),
        succeeded=share_of_runs(points, start.accuracy, failed=failed),
        oracle=oracle(points) if points else None,
        blind=pick,
        admitted=pick is not None and rule.admits(pick.seen, start.seen.utility),
    )


@dataclass(frozen=True)
class OverSeeds:
    """The mean over the `reached` of `n` seeds that gave a value; no bounds with fewer than two, nor where all of them
    are equal, which tells nothing of how far another seed would be."""

    mean: float | None
    low: float | None
    high: float | None
    reached: int
    n: int


def over_seeds(values: Sequence[float | None]) -> OverSeeds:
    """Mean with a 95 % interval by Student's t over seeds. Seeds are few, so it is wide: that is the finding. It is the
    chance of seeds alone: all are measured on the same pictures, and what others would give is not in it.

    A None (no checkpoint got there) has no value to average: it lowers `reached`, which is to be read beside the mean.
    """
    found = [value for value in values if value is not None]
    if len(found) < 2 or max(found) - min(found) < 1e-12:
        return OverSeeds(found[0] if found else None, None, None, len(found), len(values))
    mean = fmean(found)
    degrees = len(found) - 1
    half = student_t(degrees) * stdev(found) / math.sqrt(len(found))
    return OverSeeds(mean, mean - half, mean + half, len(found), len(values))
