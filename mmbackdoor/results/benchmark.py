"""What a benchmark of objectives and cleaners measured: its lines, its numbers over seeds, and what confounds them.

`points.jsonl` has a line for each model that was measured, `trainings.jsonl` one for each training. Everything that is
shown is derived from these two files.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from mmbackdoor.results.frontier import Frontier, OverSeeds, Point, Rule, Sight, blind, frontier, over_seeds
from mmbackdoor.results.record import read_lines, write_text
from mmbackdoor.types import InputError

POINTS, TRAININGS = "points.jsonl", "trainings.jsonl"
FIRED = 0.9
"""Below this ASR a poisoned model is no testbed: there is little to remove."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model: a clean control, a poisoned one, or a checkpoint of a cleaning. Rates are fractions.

    `accuracy` and `accuracy_triggered` are zero-shot top-1, the first of `n` pictures; the other and `asr` of the `asr_n`
    that are not of the target's class. `utility` and `drift` are what a defender sees (`evaluate/clip_sight.py`); a control has none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    stage: Literal["clean", "poisoned", "cleaned"]
    objective: str
    seed: int
    asr: float
    asr_n: int
    accuracy: float
    accuracy_triggered: float
    n: int
    sha256: str
    cleaner: str | None = None
    learning_rate: float | None = None
    step: int = 0
    utility: float | None = None
    drift: float | None = None

    @property
    def point(self) -> Point:
        run = f"{self.cleaner} {self.learning_rate}" if self.cleaner else self.stage
        return Point(self.asr, self.accuracy, Sight(run, self.step, self.utility or 0.0, self.drift or 0.0))


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: `pairs` in its data (`None` where it broke off), `batch_size` over all processes, and its end.

    From its log, so what was in force whatever was asked for: the highest rate and the steps up to it, the weight decay
    of matrices (cleanings log it), and the mean share of a batch's pairs of rows that have equal captions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    stage: Literal["clean", "poisoned", "cleaned"]
    objective: str
    seed: int
    pairs: int | None
    batch_size: int
    steps: int
    status: Literal["finished", "failed"]
    seconds: float | None
    cleaner: str | None = None
    learning_rate: float | None = None
    error: str | None = None
    peak_rate: float | None = None
    steps_to_peak: int | None = None
    weight_decay: float | None = None
    false_negatives: float | None = None

    @property
    def samples_seen(self) -> int:
        return self.steps * self.batch_size

    @property
    def epochs(self) -> float:
        return self.samples_seen / self.pairs if self.pairs else 0.0


@dataclass(frozen=True)
class Cell:
    """One cleaner on the models of one objective, a frontier for each seed."""

    objective: str
    cleaner: str
    seeds: tuple[int, ...]
    frontiers: tuple[Frontier, ...]

    def over(self, value: Callable[[Frontier], float | None]) -> OverSeeds:
        return over_seeds([value(one) for one in self.frontiers])

    def picks(self, who: Literal["oracle", "blind"]) -> list[Point | None]:
        """What the oracle or the blind rule picked, for each seed; None where every run broke off."""
        return [one.oracle if who == "oracle" else one.blind for one in self.frontiers]

    @property
    def lost(self) -> tuple[int, ...]:
        """The seeds with which every run broke off."""
        return tuple(seed for seed, one in zip(self.seeds, self.frontiers, strict=True) if one.blind is None)

    @property
    def beyond(self) -> tuple[int, ...]:
        """The seeds with which the blind rule found nothing that it asks for, and took the best that was there."""
        pairs = zip(self.seeds, self.frontiers, strict=True)
        return tuple(seed for seed, one in pairs if one.blind is not None and not one.admitted)


def write(folder: Path, points: Iterable[Measured], trainings: Iterable[Training]) -> None:
    for name, lines in ((POINTS, points), (TRAININGS, trainings)):
        write_text(folder / name, "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in lines))


def read(folder: Path) -> tuple[list[Measured], list[Training]]:
    """Raises `InputError` where `folder` holds no benchmark, or a damaged line."""
    points = read_lines(folder / POINTS, TypeAdapter(Measured))
    if not any(point.stage == "poisoned" for point in points):
        raise InputError(f"{str(folder / POINTS)!r} has no poisoned model; run the benchmark again")
    return points, read_lines(folder / TRAININGS, TypeAdapter(Training))


def check_whole(
    folder: str, points: Sequence[Measured], trainings: Sequence[Training], objectives: Mapping[str, Iterable[str]],
    seeds: Iterable[int],
) -> None:  # fmt: skip
    """Raises `InputError` where these lines of the benchmark in `folder` lack a poisoned model that its settings ask
    for, as they do where its last call was stopped. One whose training broke off is not lacking. `objectives`: name ->
    the keys that it sets; those of a poison of its own are refused, since what goes on from here has one for all."""
    for objective, keys in objectives.items():
        if own := [key for key in keys if key.split(".")[0] == "poison"]:
            raise InputError(
                f"{folder!r} gives {objective!r} a poison of its own ({own[0]}), and this goes on with one for all "
                "objectives; make a benchmark with pretrain.poison alone"
            )
    known = {(one.objective, one.seed) for one in points if one.stage == "poisoned"}
    known |= {(one.objective, one.seed) for one in trainings if (one.stage, one.status) == ("poisoned", "failed")}
    for objective, seed in itertools.product(objectives, seeds):
        if (objective, seed) not in known:
            raise InputError(
                f"{folder!r} has no line of the poisoned model of {objective!r} with seed {seed}, for which its "
                "config.yaml asks: its last call was stopped; call it again, to its end"
            )


def cells(points: Sequence[Measured], trainings: Sequence[Training], rule: Rule) -> list[Cell]:
    """The frontiers of every objective and cleaner, in the order of the lines. A seed with which every run of a
    cleaner broke off counts, without success: else its means would be those of the seeds that went well."""
    starts = {(one.objective, one.seed): one.point for one in points if one.stage == "poisoned"}
    groups: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for one in (*trainings, *points):
        if one.stage == "cleaned" and one.cleaner is not None:
            of = groups.setdefault((one.objective, one.cleaner), {}).setdefault(one.seed, [])
            of += [one.point] if isinstance(one, Measured) else []
    found = []
    for (objective, cleaner), of in groups.items():
        made = []
        for seed, some in of.items():
            failed = sum(
                one.status == "failed" and (one.objective, one.cleaner, one.seed) == (objective, cleaner, seed)
                for one in trainings
            )
            made.append(frontier(some, starts[objective, seed], rule, failed))
        found.append(Cell(objective, cleaner, tuple(of), tuple(made)))
    return found


def picked(points: Sequence[Measured], rule: Rule) -> list[Measured]:
    """The checkpoint of each cleaner on each poisoned model that `rule` picks, in the order of the lines."""
    starts = {(one.objective, one.seed): one.point for one in points if one.stage == "poisoned"}
    groups: dict[tuple[str, int, str | None], list[Measured]] = {}
    for one in points:
        if one.stage == "cleaned":
            groups.setdefault((one.objective, one.seed, one.cleaner), []).append(one)
    found = []
    for (objective, seed, _), some in groups.items():
        seen = [one.point for one in some]
        chosen = blind(seen, starts[objective, seed].seen, rule)
        found.append(next(one for one, point in zip(some, seen, strict=True) if point is chosen))
    return found


def span(values: Sequence[float | None]) -> str:
    """`a`, `a .. b`, or a dash for nothing."""
    known = sorted({value for value in values if value is not None})
    ends = known if len(known) < 2 else [known[0], known[-1]]
    return " .. ".join(f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in ends) or "–"


def warnings(points: Sequence[Measured], trainings: Sequence[Training]) -> list[str]:
    """What keeps these numbers from saying what they seem to say, a sentence each."""
    found = []
    broken = [one for one in trainings if one.stage != "cleaned" and one.status == "failed"]
    for one in broken:
        lacking = "nothing was cleaned there" if one.stage == "poisoned" else "there is no control"
        found.append(f"The {one.stage} training of {one.objective}, seed {one.seed}, broke off: {lacking}.")
    poisoned = [one for one in trainings if (one.stage, one.status) == ("poisoned", "finished")]
    for what, of in (
        ("batch sizes", lambda one: one.batch_size),
        ("numbers of epochs", lambda one: round(one.epochs, 2)),
        ("numbers of samples seen", lambda one: one.samples_seen),
        ("numbers of pairs", lambda one: one.pairs or 0),
    ):
        by_objective = {one.objective: of(one) for one in poisoned}
        if len(set(by_objective.values())) > 1:
            shown = ", ".join(f"{name} {value:g}" for name, value in by_objective.items())
            found.append(f"The objectives were trained with different {what} ({shown}): a difference may be due to it.")
    cleaned = [one for one in trainings if one.stage == "cleaned"]
    seen = {one.cleaner: one.samples_seen for one in cleaned if one.status == "finished"}
    if len(set(seen.values())) > 1:
        shown = ", ".join(f"{name} {value:g}" for name, value in seen.items())
        found.append(f"The cleaners saw different numbers of samples ({shown}).")
    tried: dict[tuple[str, int, str | None], int] = {}
    for one in cleaned:
        tried[one.objective, one.seed, one.cleaner] = tried.get((one.objective, one.seed, one.cleaner), 0) + 1
    if len(set(tried.values())) > 1:
        found.append("The cleaners got different numbers of runs: the one with more had more luck to draw on.")
    candidates: dict[str | None, set[int]] = {}
    for (name, *_), count in Counter((one.cleaner, one.objective, one.seed, one.learning_rate)
                                     for one in points if one.stage == "cleaned").items():  # fmt: skip
        candidates.setdefault(name, set()).add(count)
    if len(set().union(*candidates.values())) > 1:
        shown = ", ".join(f"{name} {span(list(counts))}" for name, counts in candidates.items())
        found.append(
            f"Runs have different numbers of checkpoints to pick from ({shown}): more of them are more luck to draw on."
        )
    failed = [one for one in cleaned if one.status == "failed"]
    if failed:
        names = "; ".join(f"{one.objective}, seed {one.seed}, {one.cleaner} {one.learning_rate:g}" for one in failed)
        found.append(f"{len(failed)} of {len(cleaned)} cleaning runs broke off and count as without success: {names}.")
    missed = [
        f"{one.objective}, seed {one.seed}, {one.cleaner}: {one.peak_rate:g}, not {one.learning_rate:g}"
        for one in cleaned
        if one.status == "finished" and one.peak_rate and one.learning_rate
        and abs(one.peak_rate / one.learning_rate - 1) > 1e-3
    ]  # fmt: skip
    if missed:
        shown = "; ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        found.append(f"Some cleanings never had the rate that they are named after ({shown}): is the warm-up too long?")
    for one in points:
        if one.stage == "poisoned" and one.asr < FIRED:
            found.append(
                f"The model of {one.objective}, seed {one.seed}, was never well poisoned (ASR {100 * one.asr:.1f} % at "
                f"{100 * one.accuracy:.1f} % accuracy): there is little to remove."
            )
    if not any(one.stage == "clean" for one in points):
        found.append("There is no clean model as control: what the trigger does to a sound one is not known.")
    seeds = {one.seed for one in points if one.stage == "poisoned"}
    if len(seeds) < 3:
        found.append(f"Seeds: {len(seeds)}. That is too few to say that a difference is more than chance.")
    return found
