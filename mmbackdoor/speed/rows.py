"""What a measurement found: one line for each comparison, its goal beside it, as `results.jsonl` and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from mmbackdoor.results.record import FILE_NAME, read_lines, write_text
from mmbackdoor.results.tables import Table
from mmbackdoor.speed.timing import Spread, ratios

TABLE = "table.md"


@dataclass(frozen=True)
class Goal:
    """A limit for the median of the ratios: `at_most` it, or at least."""

    limit: float
    at_most: bool = True

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Where:
    """On what a line was measured. `dtype` is that of the forward pass."""

    architecture: str
    device: str
    dtype: Literal["fp32", "bf16"]
    threads: int
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """`ours` and `peer` are medians in `unit`. `ratio` is that of the two, in the direction that `ratio_of` says, as
    median, smallest and largest of `n` rounds; `None` where there is nothing to compare with. `goal` is a limit for its
    median, `reached` whether it keeps it. `note` says what else there is to know."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    measurement: str
    name: str
    unit: str
    ours: float | None
    peer_name: str = ""
    peer: float | None = None
    ratio_of: Literal["ours / peer", "peer / ours", "exponent", ""] = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    goal: str = ""
    reached: bool | None = None
    n: int = 1
    where: Where
    note: str = ""


_ADAPTER = TypeAdapter(Row)


def compared(
    measurement: str,
    name: str,
    ours: Sequence[float],
    peer_name: str,
    peer: Sequence[float],
    where: Where,
    *,
    unit: str = "s/step",
    goal: Goal | None = None,
    times_less: bool = False,
    note: str = "",
) -> Row:
    """Ours against a peer, in values of the same rounds: the ratio is ours / peer or, for how many `times_less` we take
    (and where the goal is of that kind), peer / ours."""
    upside_down = times_less or (goal is not None and not goal.at_most)
    spread = ratios(peer, ours) if upside_down else ratios(ours, peer)
    return Row(
        measurement=measurement, name=name, unit=unit, ours=Spread.of(ours).median, peer_name=peer_name,
        peer=Spread.of(peer).median, ratio_of="peer / ours" if upside_down else "ours / peer", ratio=spread.median,
        ratio_low=spread.low, ratio_high=spread.high, goal=str(goal or ""), n=spread.n, where=where, note=note,
        reached=goal.reached(spread.median) if goal else None,
    )  # fmt: skip


def read(path: Path) -> list[Row]:
    """Raises `InputError` that names the line that is not ours."""
    return read_lines(path, _ADAPTER)


def write(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def publish(folder: Path, rows: Sequence[Row]) -> Table:
    """Writes `results.jsonl` and `table.md`; returns the table."""
    shown = table(rows)
    write(folder / FILE_NAME, rows)
    write_text(folder / TABLE, shown.markdown() + "\n")
    return shown


def table(rows: Sequence[Row]) -> Table:
    header = ("what", "ours", "against", "its value", "ratio", "goal", "reached", "n", "measured on", "note")
    return Table(header, tuple(_line(row) for row in rows))


def _line(row: Row) -> tuple[str, ...]:
    ratio = ""
    if row.ratio is not None:
        direction = " times less" if row.ratio_of == "peer / ours" else ""
        ratio = f"{row.ratio:.3g}{direction} ({row.ratio_low:.3g} .. {row.ratio_high:.3g})"
    where = row.where
    place = f"{where.architecture}, {where.device}, {where.dtype}, {where.threads} threads"
    if where.processes > 1:
        place += f", {where.processes} processes"
    reached = "" if row.reached is None else "yes" if row.reached else "no"
    return (
        row.name, _number(row.ours, row.unit), row.peer_name, _number(row.peer, row.unit), ratio, row.goal, reached,
        str(row.n), place, row.note,
    )  # fmt: skip


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}"
