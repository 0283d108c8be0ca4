"""What poisoned pairs left among the clean ones do to a cleaning, and what filters do about them: lines, tables, page.

The folder is a benchmark's (`points.jsonl`, `trainings.jsonl`), whose cleaners are the filters before one and the same
cleaning; `filters.jsonl` says what each filter found. Everything that is shown is derived from these three files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from mmbackdoor.results import benchmark, benchmark_report, benchmark_tables, grids
from mmbackdoor.results.benchmark import Cell, Measured, Rule, Training
from mmbackdoor.results.benchmark_tables import per_cent
from mmbackdoor.results.dots import WORDS, picks
from mmbackdoor.results.frontier import over_seeds
from mmbackdoor.results.record import read_lines, write_text
from mmbackdoor.results.tables import Table, markdown_page

FILTERS, PICTURE = "filters.jsonl", "stray.png"
NO_STRAYS, UNFILTERED = "no_strays", "unfiltered"
"""The lines beside the filters: the benchmark's own cleaning without stray pairs, and the one with all of them."""


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What one filter did to the pairs to clean with: of `pairs`, `strays` of them poisoned, it left out `dropped`,
    among them `found` poisoned ones. `auroc` is None where the truth does not tell (no strays, or nothing else)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    objective: str
    seed: int
    filter: str
    pairs: int
    strays: int
    dropped: int
    found: int
    auroc: float | None = None


def filtered(detection: Path, objective: str, seed: int, name: str) -> Filtered:
    """From the `detection.json` of a filter, which was judged after it was done."""
    said = json.loads(detection.read_text(encoding="utf-8"))
    return Filtered(
        objective=objective, seed=seed, filter=name, pairs=said["samples"], strays=said["poisoned"],
        dropped=said["dropped"], found=said.get("poisoned_dropped", 0), auroc=said.get("auroc"),
    )  # fmt: skip


def without_strays(
    points: Iterable[Measured], trainings: Iterable[Training], cleaner: str, rates: Sequence[float]
) -> tuple[list[Measured], list[Training]]:
    """Of a benchmark's lines: the models before cleaning, and its cleanings by `cleaner` at `rates`, as `NO_STRAYS`.
    No cleanings where it did not try every one of these rates: they would be fewer trials."""
    trainings = list(trainings)
    whole = set(rates) <= {one.learning_rate for one in trainings if one.cleaner == cleaner}

    def kept(one: Measured | Training) -> bool:
        return one.cleaner is None or (whole and one.cleaner == cleaner and one.learning_rate in rates)

    def renamed(one):
        return one if one.cleaner is None else replace(one, cleaner=NO_STRAYS)

    return [renamed(one) for one in points if kept(one)], [renamed(one) for one in trainings if kept(one)]


def write(
    folder: Path, points: Iterable[Measured], trainings: Iterable[Training], filters: Iterable[Filtered]
) -> None:
    benchmark.write(folder, points, trainings)
    write_text(folder / FILTERS, "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in filters))


def read_filters(folder: Path) -> list[Filtered]:
    """Raises `InputError` where `folder` has none, or a damaged line."""
    return read_lines(folder / FILTERS, TypeAdapter(Filtered))


def filter_table(filters: Sequence[Filtered]) -> Table:
    """How many of the stray pairs each filter found, of each seed and in the mean, and what it left out for that."""
    lines = []
    for row in dict.fromkeys((one.objective, one.filter) for one in filters):
        some = [one for one in filters if (one.objective, one.filter) == row]
        ranked = [one.auroc for one in some if one.auroc is not None]
        lines.append((
            ", ".join(row),
            per_cent(over_seeds([one.found / one.strays for one in some if one.strays])),
            " / ".join(f"{one.found} of {one.strays}" for one in some),
            f"{sum(ranked) / len(ranked):.4f}" if ranked else "–",
            per_cent(over_seeds([one.dropped / one.pairs for one in some])),
            str(len(some)),
        ))  # fmt: skip
    header = ("objective, filter", "strays found, %", "of each seed", "AUROC", "pairs left out, %", "seeds")
    return Table(header, tuple(lines))


def tables(
    points: Sequence[Measured], trainings: Sequence[Training], cells: Sequence[Cell], filters: Sequence[Filtered]
) -> dict[str, Table]:
    return {"What the filters found": filter_table(filters)} | benchmark_tables.tables(points, trainings, cells)


def build(folder: Path, rule: Rule, words: str) -> Path:
    """Write `folder/report.html`, `table.md` and `stray.png`; the page's path. `rule` picks blind, `words` say how.

    Raises `InputError` where `folder` holds no such benchmark.
    """
    points, trainings = benchmark.read(folder)
    filters = read_filters(folder)
    cells = in_order(benchmark.cells(points, trainings, rule))
    some = any(one for cell in cells for one in cell.picks("blind"))
    picture = grids.save(picks(cells, "filter before cleaning"), folder / PICTURE) if some else None
    shown, said = tables(points, trainings, cells, filters), benchmark.warnings(points, trainings)
    write_text(folder / benchmark_report.TABLE, markdown_page(shown, said))
    strays = sorted({one.strays for one in filters})
    return benchmark_report.page(
        folder,
        "study.html.j2",
        title="Poisoned pairs among the clean ones",
        lead=f"{' or '.join(map(str, strays)) or 'no'} stray pairs; {len(points)} models measured",
        files=f"{benchmark.POINTS}, {benchmark.TRAININGS} and {FILTERS}",
        sentences=benchmark_report.sentences(cells),
        warnings=said,
        picture=benchmark_report.inline(picture) if picture else None,
        drawn="ASR and accuracy of what was picked after each filter, a panel for each objective",
        words=f"{WORDS} The oracle looks at the trigger. The blind rule, written down before the run: {words}",
        tables=shown,
    )


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Without strays first, then unfiltered, then the filters as they came; objectives as they came."""
    first = (NO_STRAYS, UNFILTERED)
    objectives = list(dict.fromkeys(cell.objective for cell in cells))
    names = [*first, *dict.fromkeys(cell.cleaner for cell in cells if cell.cleaner not in first)]
    return sorted(cells, key=lambda cell: (objectives.index(cell.objective), names.index(cell.cleaner)))
