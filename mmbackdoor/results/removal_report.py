"""`report.html`, `table.md` and `curves.png` of a benchmark of removals, from its own files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mmbackdoor.results import benchmark_report, grids, removal_benchmark, removal_comparison, removal_tuning
from mmbackdoor.results.record import write_text
from mmbackdoor.results.removal_benchmark import (
    CLEAN,
    NONE,
    Point,
    RemovalRun,
    judged,
    pooled,
    rows,
    seeds_of,
    situation_name,
)
from mmbackdoor.results.removal_curves import curves
from mmbackdoor.results.tables import Table, markdown_page

TABLE, PICTURE = "table.md", "curves.png"


def is_removal_benchmark(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (removal_benchmark.POINTS, removal_benchmark.RUNS))


def build(folder: Path) -> Path:
    """Write `folder/report.html`, `folder/table.md` and `folder/curves.png`; the page's path.

    Raises `InputError` where `folder` holds no such benchmark.
    """
    points, runs = removal_benchmark.read(folder)
    trials = removal_tuning.read(folder)
    tuning = removal_tuning.table(trials)
    write_text(folder / TABLE, markdown(folder) + _tuning_part(tuning))
    picture = grids.save(curves(points), folder / PICTURE)
    further = {removal_comparison.FILE_NAME: removal_comparison.read(folder), removal_tuning.FILE_NAME: trials}
    files = [removal_benchmark.POINTS, removal_benchmark.RUNS, *(name for name, lines in further.items() if lines)]
    return benchmark_report.page(
        folder,
        "removal_benchmark.html.j2",
        files=" and ".join([", ".join(files[:-1]), files[-1]]),
        sentences=sentences(points, runs),
        warnings=removal_benchmark.warnings(points, runs),
        picture=benchmark_report.inline(picture),
        tables=tables(folder),
        tuning=tuning,
        rule=rule_words(folder),
        runs=runs,
        situation_name=situation_name,
        counts={
            "rows": len(rows(points)),
            "seeds": len({one.seed for one in points if one.seed is not None}),
            "numbers": len(points),
        },
    )


def tables(folder: Path) -> dict[str, Table]:
    """Title -> table of all that was measured, but for the tuning."""
    compared = removal_comparison.tables(removal_comparison.read(folder))
    return removal_benchmark.tables(*removal_benchmark.read(folder)) | compared


def text(folder: Path) -> str:
    """The tables and the warnings of the benchmark in `folder`, for a terminal."""
    parts = [f"{title}\n\n{table.text()}" for title, table in tables(folder).items()]
    return "\n\n".join(["", *parts, "\n".join(removal_benchmark.warnings(*removal_benchmark.read(folder)))])


def markdown(folder: Path) -> str:
    """The same for a README."""
    return markdown_page(tables(folder), removal_benchmark.warnings(*removal_benchmark.read(folder)))


def sentences(points: Sequence[Point], runs: Sequence[RemovalRun]) -> list[str]:
    """The verdict on each removal of each attack, with the numbers and the seeds that it rests on."""
    ends, found = pooled(points), []
    every = dict.fromkeys([*rows(ends), *((one.attack, one.removal) for one in runs if not one.situation)])
    for row in every:
        if row[1] in (CLEAN, NONE):
            continue
        known, lacking = seeds_of(points, runs, row)
        if not known:
            found.append(f"{row[1]} on {row[0]}: it broke off with every seed")
            continue
        beside = f", in {len(known)} of {len(known) + len(lacking)} seeds" if lacking else ""
        beside += f" (with seed {', '.join(map(str, lacking))} something broke off)" if lacking else ""
        found.append(f"{row[1]} on {row[0]}{beside}: {judged(ends, row).sentence}")
    return found


def rule_words(folder: Path) -> str:
    """The rule of tuning in words, read from `config.yaml`; the default's where that is missing."""
    config = folder / "config.yaml"
    content = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    rule = ((content or {}).get("tuning") or {}).get("rule") or {}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()}
    return removal_tuning.LowestASR(**given).words


def _tuning_part(tuning: Table | None) -> str:
    return f"\n**Tuning by an oracle, on selection prompts**\n\n{tuning.markdown()}\n" if tuning else ""
