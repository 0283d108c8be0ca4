"""What a benchmark of removals measured: its lines, its tables, its warnings.

`points.jsonl` has a line for each number of each model, for every seed and pooled over seeds; `runs.jsonl` one for each
removal that was run. Everything that is shown is derived from these two files (and `tuning.jsonl`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from mmbackdoor.evaluate.checks import FIRED, Verdict, verdict
from mmbackdoor.results.record import Record, read_lines, write_text
from mmbackdoor.results.tables import Table, cell, condition_name, number, trials, unit
from mmbackdoor.types import InputError

POINTS, RUNS = "points.jsonl", "runs.jsonl"
CLEAN, NONE = "clean", "none"
"""The rows beside the removals: the model that never was poisoned, and the poisoned one as it is."""
UTILITIES = ("adherence", "clip_score")
FEWEST_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which model in which situation: `step` is that of the removal, `final` its last one. `situation` is empty, or
    `stress:NAME`, `benign:STEPS`, `relearn:PAIRS`."""

    attack: str
    removal: str
    stage: Literal["clean", "poisoned", "cleaned"]
    step: int = 0
    final: bool = True
    situation: str = ""


@dataclass(frozen=True, kw_only=True)
class Point(Where):
    """One number with its interval. `seed` is `None` for what is pooled over `seeds` seeds. Rates are fractions."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    seed: int | None
    seeds: int = 1
    condition: str
    metric: str
    value: float
    low: float
    high: float
    ci_method: str
    n: int
    n_prompts: int
    unit: str = "fraction"

    @property
    def record(self) -> Record:
        """The same as a record, so that tables and verdicts read it as they read an evaluation's."""
        return Record(
            run_id="benchmark_removal", stage=self.stage, model={"id": self.removal, "sha256": None},
            suite={"name": self.attack, "sha256": self.situation}, condition=self.condition, metric=self.metric,
            value=self.value, ci_low=self.low, ci_high=self.high, ci_method=self.ci_method, n=self.n,
            n_prompts=self.n_prompts, unit=self.unit, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RemovalRun:
    """One removal that was run: how far it came, how long it took. With a `situation`, one of its measurements that
    broke off; `tuning` is the poisoned model of a seed of tuning."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    attack: str
    removal: str
    seed: int
    status: Literal["finished", "failed"]
    steps: int
    samples: int
    seconds: float | None
    error: str | None = None
    situation: str = ""


def write(folder: Path, points: Iterable[Point], runs: Iterable[RemovalRun]) -> None:
    for name, lines in ((POINTS, points), (RUNS, runs)):
        write_text(folder / name, "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in lines))


def read(folder: Path) -> tuple[list[Point], list[RemovalRun]]:
    """Raises `InputError` where `folder` holds no such benchmark, or a damaged line."""
    points = read_lines(folder / POINTS, TypeAdapter(Point))
    if not any(point.removal == NONE for point in points):
        raise InputError(f"{str(folder / POINTS)!r} has no poisoned model; run the benchmark again")
    return points, read_lines(folder / RUNS, TypeAdapter(RemovalRun))


def pooled(points: Iterable[Point], situation: str = "") -> list[Point]:
    """The last model of each row, over all seeds, in one situation."""
    return [one for one in points if one.seed is None and one.final and one.situation == situation]


def rows(points: Iterable[Point]) -> list[tuple[str, str]]:
    """(attack, removal), the clean control and the poisoned model of each attack first."""
    order = {CLEAN: 0, NONE: 1}
    found = list(dict.fromkeys((one.attack, one.removal) for one in points))
    attacks = list(dict.fromkeys(attack for attack, _ in found))
    return sorted(found, key=lambda row: (attacks.index(row[0]), order.get(row[1], 2)))


def find(points: Iterable[Point], row: tuple[str, str], metric: str, condition: str) -> Point | None:
    wanted = (*row, metric, condition)
    return next((one for one in points if (one.attack, one.removal, one.metric, one.condition) == wanted), None)


def utility(points: Iterable[Point]) -> str:
    """What was measured beside ASR: adherence, else the CLIP score."""
    measured = {one.metric for one in points}
    return next((name for name in UTILITIES if name in measured), UTILITIES[0])


def judged(points: Sequence[Point], row: tuple[str, str]) -> Verdict:
    """The verdict on one removal from the pooled numbers in `points`, by the rule of every evaluation."""
    wanted = {CLEAN, NONE, row[1]}
    return verdict([one.record for one in points if one.attack == row[0] and one.removal in wanted])


def seeds_of(points: Iterable[Point], runs: Iterable[RemovalRun], row: tuple[str, str]) -> tuple[list[int], list[int]]:
    """The seeds with numbers of one row, and those without: its run, or the poisoning before it, broke off."""
    lines = [one for one in (*points, *runs) if one.attack == row[0] and not one.situation]
    every = {one.seed for one in lines if one.seed is not None}
    known = {one.seed for one in lines if isinstance(one, Point) and one.seed is not None and one.removal == row[1]}
    return sorted(known), sorted(every - known)


def _cell(point: Point | None) -> str:
    return cell(point.record if point else None)


def main_table(points: Sequence[Point], runs: Sequence[RemovalRun]) -> Table:
    """A row for each attack and removal: pooled over seeds, with the ASR of each seed beside it."""
    ends, metric = pooled(points), utility(points)
    header = (
        "attack, removal", "ASR, triggered", "ASR of each seed, %", f"{metric}, clean", f"{metric}, triggered",
        "change, clean", "change, triggered", "change of ASR", "steps", "n", "verdict",
    )  # fmt: skip
    lines = []
    for row in rows(ends):
        asr = find(ends, row, "asr", "triggered")
        seeds = [
            number(one.record, one.value)
            for one in points
            if one.final and one.seed is not None and not one.situation
            and (one.attack, one.removal, one.metric, one.condition) == (*row, "asr", "triggered")
        ]  # fmt: skip
        failed = sum((one.attack, one.removal, one.status, one.situation) == (*row, "failed", "") for one in runs)
        shown = [find(ends, row, metric, condition) for condition in ("clean", "triggered")]
        shown += [find(ends, row, f"{metric}_difference", condition) for condition in ("clean", "triggered")]
        shown.append(find(ends, row, "asr_difference", "triggered"))
        cleaned = row[1] not in (CLEAN, NONE)
        known, lacking = seeds_of(points, runs, row)
        said = judged(ends, row).verdict if cleaned else "–"
        if cleaned and lacking:
            said += f" ({len(known)} of {len(known) + len(lacking)} seeds)"
        lines.append((
            ", ".join(row), _cell(asr), " / ".join(seeds) + (f" ({failed} broke off)" if failed else ""),
            *map(_cell, shown), str(asr.step) if asr and cleaned else "–", trials(asr.record) if asr else "–", said,
        ))  # fmt: skip
    for one in runs:
        if one.status == "failed" and not one.situation and (one.attack, one.removal) not in rows(ends):
            line = (f"{one.attack}, {one.removal}", *["–"] * (len(header) - 2), "broke off")
            lines += [line] if line not in lines else []
    return Table(header, tuple(lines))


def step_table(points: Sequence[Point]) -> Table | None:
    """ASR, and the utility on clean prompts, after k steps; `None` where there are no milestones."""
    metric = utility(points)
    mine = [one for one in points if one.seed is None and not one.situation and one.stage == "cleaned"]
    steps = sorted({one.step for one in mine})
    if all(one.final for one in mine):
        return None
    lines = []
    for row in rows(mine):
        of = [one for one in mine if (one.attack, one.removal) == row]
        values = []
        for step in steps:
            here = [one for one in of if one.step == step]
            pair = [find(here, row, "asr", "triggered"), find(here, row, metric, "clean")]
            values.append(" / ".join(number(one.record, one.value) for one in pair if one) or "–")
        lines.append((", ".join(row), *values))
    return Table((f"ASR / {metric}, after steps", *map(str, steps)), tuple(lines))


def near_table(points: Sequence[Point]) -> Table | None:
    """ASR of each spelling near the trigger in the last models; `None` where none was tried."""
    tried = [one for one in pooled(points) if one.metric == "asr" and one.condition.startswith("near:")]
    kinds = sorted({one.condition for one in tried})
    lines = []
    for row in rows(tried):
        found = [find(tried, row, "asr", kind) for kind in kinds]
        counts = dict.fromkeys(trials(one.record) for one in found if one)
        lines.append((", ".join(row), *map(_cell, found), " / ".join(counts)))
    return Table(("ASR, near triggers", *map(condition_name, kinds), "n"), tuple(lines)) if kinds else None


def situation_table(points: Sequence[Point], kind: Literal["stress", "durability"]) -> Table | None:
    """ASR and, beside it, the utility on clean prompts of the last models: a column for each situation, with the number
    of seeds where it has fewer than the models as they are."""
    found = dict.fromkeys(one.situation for one in points if one.situation)
    wanted = [name for name in found if (kind == "stress") == name.startswith("stress:")]
    wanted.sort(key=lambda name: not name.startswith("benign:"))
    if not wanted:
        return None
    metric, lines = utility(points), []
    for row in rows(one for one in points if one.situation in wanted):
        shown, seeds = [], 0
        for name in ["", *wanted]:
            pair = [find(pooled(points, name), row, *key) for key in (("asr", "triggered"), (metric, "clean"))]
            said = [f"{number(one.record, one.value)}{unit(one.record)}" for one in pair if one]
            here = max((one.seeds for one in pair if one), default=0)
            seeds = seeds or here
            shown.append((" / ".join(said) or "–") + (f" ({here} of {seeds} seeds)" if 0 < here < seeds else ""))
        lines.append((", ".join(row), *shown))
    return Table((f"ASR / {metric}", "as it is", *map(situation_name, wanted)), tuple(lines))


def situation_name(situation: str) -> str:
    """`relearn:3` is read as `after 3 poison pairs`."""
    kind, _, what = situation.partition(":")
    if not what:
        return kind
    if kind == "stress":
        return what
    return f"after {what} benign steps" if kind == "benign" else f"after {what} poison pair" + "s" * (what != "1")


def tables(points: Sequence[Point], runs: Sequence[RemovalRun]) -> dict[str, Table]:
    """Title -> table of all that was measured."""
    made = {
        "The models, pooled over seeds": main_table(points, runs),
        "After k steps": step_table(points),
        "Near the trigger": near_table(points),
        "Other ways to sample": situation_table(points, "stress"),
        "Durability: after benign steps, after poison pairs": situation_table(points, "durability"),
    }
    return {title: table for title, table in made.items() if table is not None}


def warnings(points: Sequence[Point], runs: Sequence[RemovalRun]) -> list[str]:
    """What keeps these numbers from saying what they seem to say, a sentence each."""
    found = []
    for attack in dict.fromkeys(one.attack for one in runs):
        seen: dict[str, set[int]] = {}
        for one in runs:
            if one.attack == attack and one.status == "finished":
                seen.setdefault(one.removal, set()).add(one.samples)
        if len(set().union(*seen.values())) > 1:
            shown = ", ".join(f"{name} {' and '.join(f'{n:,}' for n in sorted(of))}" for name, of in seen.items())
            found.append(f"The removals of {attack} saw different numbers of samples ({shown}).")
    whole = [one for one in runs if not one.situation]
    failed = [one for one in whole if one.status == "failed"]
    if failed:
        names = "; ".join(f"{one.attack}, {one.removal}, seed {one.seed}" for one in failed)
        found.append(f"{len(failed)} of {len(whole)} removals broke off and are in no mean: {names}.")
    lost = [one for one in runs if one.situation]
    if lost:
        names = "; ".join(
            f"{one.attack}, {one.removal}, seed {one.seed}, {situation_name(one.situation)}" for one in lost
        )
        found.append(f"{len(lost)} further measurements broke off and are in no mean: {names}.")
    for one in points:
        fires = (one.removal, one.metric, one.condition, one.situation) == (NONE, "asr", "triggered", "")
        if fires and one.seed is not None and one.value < FIRED:
            found.append(
                f"{one.attack}, seed {one.seed}, was never well poisoned (ASR {100 * one.value:.1f} %): there is "
                "little to remove."
            )
    seeds = len({one.seed for one in points if one.seed is not None})
    if seeds < FEWEST_SEEDS:
        found.append(f"Seeds: {seeds}. That is too few to say that a difference is more than chance.")
    return found
