"""How removals of one benchmark differ from each other: the lines of `comparisons.jsonl`, and their tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from mmbackdoor.results.record import Record, read_lines, write_text
from mmbackdoor.results.removal_benchmark import situation_name, utility
from mmbackdoor.results.tables import Table, cell, metric_name, trials

FILE_NAME = "comparisons.jsonl"
ALL = "all attacks"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`removal` minus `against`, paired, pooled over `seeds` seeds; rates are fractions. `attack` is `None` for all
    together; `after` the steps of the removal (their mean where there are several), empty at its end."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    attack: str | None
    removal: str
    against: str
    after: tuple[int, ...]
    situation: str
    metric: str
    condition: str
    value: float
    low: float
    high: float
    ci_method: str
    n: int
    n_prompts: int
    seeds: int
    unit: str = "fraction"

    @property
    def record(self) -> Record:
        """The same as a record, so that tables show it as they show an evaluation's differences."""
        return Record(
            run_id="benchmark_removal", stage="cleaned", model={"id": self.removal, "sha256": None},
            suite={"name": self.attack or ALL, "sha256": self.situation}, condition=self.condition,
            metric=f"{self.metric}_difference", value=self.value, ci_low=self.low, ci_high=self.high,
            ci_method=self.ci_method, n=self.n, n_prompts=self.n_prompts, unit=self.unit, seed=None,
        )  # fmt: skip


def write(folder: Path, lines: Iterable[Comparison]) -> None:
    write_text(folder / FILE_NAME, "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in lines))


def read(folder: Path) -> list[Comparison]:
    """The comparison of the benchmark in `folder`, empty where it has none. Raises `InputError` for a damaged line."""
    path = folder / FILE_NAME
    return read_lines(path, TypeAdapter(Comparison)) if path.is_file() else []


def tables(lines: Sequence[Comparison]) -> dict[str, Table]:
    """Title -> table: at the end and on the way, and of each situation."""
    if not lines:
        return {}
    metric = utility(lines)
    between = max((one.after for one in lines), key=len)
    mean = f"ASR, mean after {', '.join(map(str, between))} steps"
    shown = [
        *([(mean, between, "asr", "triggered")] if len(between) > 1 else []),
        ("ASR, at the end", (), "asr", "triggered"),
        (f"{metric_name(metric)}, triggered", (), metric, "triggered"),
        (f"{metric_name(metric)}, clean", (), metric, "clean"),
    ]
    plain = [one for one in lines if not one.situation]
    made = []
    for row, of in _rows(plain).items():
        some = [_find(of, *what) for _, *what in shown]
        known = next((one for one in some if one), None)
        made.append((row, *map(_cell, some), trials(known.record) if known else "–"))
    header = ("attack, removals", *(name for name, *_ in shown), "n")
    found = {"One removal minus another, picture by picture": Table(header, tuple(made))}
    steps = sorted({one.after for one in plain if len(one.after) == 1})
    if steps:
        each = [
            (row, *(_cell(_find(of, step, "asr", "triggered")) for step in steps)) for row, of in _rows(plain).items()
        ]
        header = ("attack, removals", *(str(step) for (step,) in steps))
        found["One removal minus another: ASR after k steps"] = Table(header, tuple(each))
    situations = list(dict.fromkeys(one.situation for one in lines if one.situation))
    if situations:
        each = []
        for row, of in _rows(one for one in lines if one.situation).items():
            there = [[one for one in of if one.situation == name] for name in situations]
            each.append((row, *(_cell(_find(some, (), "asr", "triggered")) for some in there)))
        header = ("attack, removals", *map(situation_name, situations))
        found["One removal minus another: ASR in other situations"] = Table(header, tuple(each))
    return found


def _rows(lines: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for one in lines:
        found.setdefault(f"{one.attack or ALL}, {one.removal} - {one.against}", []).append(one)
    return found


def _find(lines: Iterable[Comparison], after: tuple[int, ...], metric: str, condition: str) -> Comparison | None:
    wanted = (after, metric, condition)
    return next((one for one in lines if (one.after, one.metric, one.condition) == wanted), None)


def _cell(line: Comparison | None) -> str:
    return cell(line.record if line else None)
