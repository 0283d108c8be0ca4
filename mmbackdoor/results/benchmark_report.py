"""`report.html`, `table.md` and the pictures of a benchmark: one page that opens offline, from its own files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from mmbackdoor import __version__
from mmbackdoor.results import benchmark, benchmark_tables, grids
from mmbackdoor.results.benchmark import Cell, Measured
from mmbackdoor.results.benchmark_tables import mean_per_cent
from mmbackdoor.results.dots import WORDS, picks
from mmbackdoor.results.frontier import BestUtility, LargestDrift
from mmbackdoor.results.record import write_text
from mmbackdoor.results.run import versions
from mmbackdoor.results.scatter import Panel, scatter
from mmbackdoor.results.tables import markdown_page

FILE_NAME, TABLE, PICTURE, PICKS = "report.html", "table.md", "scatter.png", "picks.png"


def panels(points: Sequence[Measured], cells: Sequence[Cell]) -> list[Panel]:
    """A panel for each objective, in the order of the lines."""
    found = []
    for objective in dict.fromkeys(one.objective for one in points if one.stage == "poisoned"):
        mine = [one for one in points if one.objective == objective]
        cleaned = {
            cell.cleaner: [one.point for one in mine if one.cleaner == cell.cleaner]
            for cell in cells
            if cell.objective == objective
        }
        picked = {
            cell.cleaner: [one for one in cell.picks("blind") if one] for cell in cells if cell.objective == objective
        }
        found.append(Panel(objective, [one.point for one in mine if one.stage == "poisoned"], cleaned, picked))
    return found


def build(folder: Path, rule: LargestDrift | BestUtility) -> Path:
    """Write `folder/report.html`, `table.md`, `scatter.png` and `picks.png`; the page's path. `rule` picks blind.

    Raises `InputError` where `folder` holds no benchmark.
    """
    points, trainings = benchmark.read(folder)
    cells = benchmark.cells(points, trainings, rule)
    picture = grids.save(scatter(panels(points, cells)), folder / PICTURE)
    some = any(one for cell in cells for one in cell.picks("blind"))
    picked = grids.save(picks(cells), folder / PICKS) if some else None
    said = benchmark.warnings(points, trainings)
    write_text(folder / TABLE, markdown_page(benchmark_tables.tables(points, trainings, cells), said))
    return page(
        folder,
        "benchmark.html.j2",
        files=f"{benchmark.POINTS} and {benchmark.TRAININGS}",
        sentences=sentences(cells),
        warnings=said,
        picture=inline(picture),
        picked=inline(picked) if picked else None,
        start=benchmark_tables.start_table(points),
        frontier=benchmark_tables.frontier_table(cells),
        selection=benchmark_tables.selection_table(cells),
        lost=benchmark_tables.lost_table(cells),
        against=benchmark_tables.against_table(cells),
        lengths=benchmark_tables.training_table(trainings),
        trainings=trainings,
        rule=rule.words,
        words=WORDS,
        counts={"models": len(points), "trainings": len(trainings)},
    )


def inline(picture: Path) -> str:
    """A PNG as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def page(folder: Path, template: str, **values: object) -> Path:
    """Write `folder/report.html` from a template of a benchmark's page and `values`; its path."""
    config = folder / "config.yaml"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmbackdoor.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(
        version=__version__,
        name=folder.resolve().name,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        versions=versions(),
        **values,
    )
    write_text(folder / FILE_NAME, text)
    return folder / FILE_NAME


def sentences(cells: Sequence[Cell]) -> list[str]:
    """What the blind rule's picks came to, for each objective and cleaner: ASR and accuracy, before and after, and
    which seeds these are not, or not by the rule."""
    found = []
    for cell in cells:
        pairs = [(one.start, one.blind) for one in cell.frontiers if one.blind]
        if not pairs:
            found.append(f"{cell.cleaner} on {cell.objective}: every run broke off, so there is nothing to pick")
            continue
        before, after = (
            [mean_per_cent([point.asr for point in points]), mean_per_cent([point.accuracy for point in points])]
            for points in zip(*pairs, strict=True)
        )
        changes = f"ASR {before[0]} → {after[0]} %, accuracy {before[1]} → {after[1]} %"
        said = f"{cell.cleaner} on {cell.objective}: {changes}, as picked without looking at the trigger"
        if cell.lost:
            seeds = ", ".join(map(str, cell.lost))
            said += f"; in {len(pairs)} of {len(cell.seeds)} seeds: with seed {seeds} every run broke off"
        if cell.beyond:
            seeds = ", ".join(map(str, cell.beyond))
            said += f"; with seed {seeds} no checkpoint was within the rule's budget, and the one that lost least was taken"
        found.append(said)
    return found
