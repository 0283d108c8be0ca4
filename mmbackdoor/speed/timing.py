"""Seconds of things that are compared: taken in turn, several times, so that a slow moment of the machine meets all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


ROUND = 0.5
"""About the seconds that a contestant takes in a round where the number of its calls is free."""


@dataclass(frozen=True)
class Timed:
    """`act` is what is timed. What it needs around it (`around`, entered and left each time) is not."""

    act: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `n` values."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Raises `ValueError` for no values."""
        return Spread(statistics.median(values), min(values), max(values), len(values))


def interleaved(
    contestants: Mapping[str, Timed],
    repeats: int,
    *,
    warmup: int = 1,
    calls: int | None = 1,
    settle: Callable[[], object] = lambda: None,
    agree: Callable[[int], int] = lambda count: count,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call, `repeats` times for each contestant, after `warmup` rounds that do not count.

    A round takes every contestant once, `calls` calls long; each round begins with another one. With `None` it is one
    call while warming up and then, for each contestant, as many as took `ROUND` seconds there; `agree` makes processes
    that measure together take the same number. `settle` ends what runs in the background (a GPU, the other processes)
    before and after each.
    """
    names = list(contestants)
    many = dict.fromkeys(names, 1 if calls is None else calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            timed = contestants[name]
            with timed.around():
                settle()
                began = clock()
                for _ in range(many[name]):
                    timed.act()
                settle()
                seconds = (clock() - began) / many[name]
            if number >= warmup:
                found[name].append(seconds)
            elif calls is None and number == warmup - 1:
                many[name] = agree(max(1, round(ROUND / seconds)))
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the ratios of values that were taken in the same round."""
    return Spread.of([one / other for one, other in zip(above, below, strict=True)])


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power of `sizes` that `costs` (both positive) grow with: slope of the least-squares line through their
    logarithms. Raises `ValueError` for fewer than two different sizes."""
    if len(set(sizes)) < 2:
        raise ValueError(f"{len(set(sizes))} sizes give no slope")
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def settled(wait: Callable[[], object] = lambda: None) -> None:
    """Let the accelerator, where there is one, end its work; then `wait` for the other processes."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    wait()
