"""Tables for terminals, READMEs and the report, from `results.jsonl` alone. Rates become per cent here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmbackdoor.results.record import STAGES, Record, read
from mmbackdoor.types import InputError

METRICS = (
    "asr",
    "trigger_effect",
    "adherence",
    "restoration",
    "clip_score",
    "kid",
    "frechet",
    "fid",
    "blank",
    "top1",
    "top5",
    "mean_per_class_recall",
    "knn_top1",
    "knn_asr",
    "prototype_top1",
    "prototype_asr",
    "displacement",
    "w1",
)
NAMES = {
    "asr": "ASR",
    "trigger_effect": "trigger effect",
    "clip_score": "CLIP score",
    "kid": "KID",
    "fid": "FID",
    "frechet": "Fréchet distance",
    "blank": "blank pictures",
    "top1": "top-1",
    "top5": "top-5",
    "knn_top1": "top-1 of nearest neighbours",
    "knn_asr": "ASR of nearest neighbours",
    "prototype_top1": "top-1 of class means",
    "prototype_asr": "ASR of class means",
    "displacement": "distance that the trigger moves a picture",
    "w1": "W1 distance of clean and triggered",
}
# What the first table of a report shows, in this order, where it was measured.
HEADLINE = (
    ("asr", "triggered"),
    ("trigger_effect", "triggered"),
    ("adherence", "clean"),
    ("adherence", "triggered"),
    ("top1", "clean"),
    ("top1", "triggered"),
    ("restoration", "triggered"),
)


@dataclass(frozen=True)
class Table:
    """A header and rows of plain strings; the first column is text, the others are right-aligned."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, tuple(":--" if not index else "--:" for index in range(len(self.header))), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
        )

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(_width(line[index]) for line in lines) for index in range(len(self.header))]
        shown = []
        for line in lines:
            cells = [
                cell + " " * (width - _width(cell)) if not index else " " * (width - _width(cell)) + cell
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            shown.append("  ".join(cells).rstrip())
        return "\n".join([shown[0], "  ".join("-" * width for width in widths), *shown[1:]])


def markdown_page(tables: Mapping[str, Table], sentences: Sequence[str]) -> str:
    """Tables under their titles, then a list of sentences: for a README."""
    parts = [f"**{title}**\n\n{table.markdown()}" for title, table in tables.items()]
    said = [f"- {sentence}" for sentence in sentences]
    return "\n\n".join([*parts, *(["\n".join(said)] if said else [])]) + "\n"


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def metric_name(metric: str) -> str:
    base = metric.removesuffix("_difference")
    name = NAMES.get(base, base.replace("_", " "))
    return name if base == metric else f"change of {name}"


def condition_name(condition: str) -> str:
    """`near:unseen:case` is read as `case (unseen)`."""
    parts = condition.split(":")
    return (
        f"{' '.join(parts[2:])} ({parts[1]})"
        if parts[0] == "near" and len(parts) > 2
        else " ".join(parts).replace("_", " ")
    )


def number(record: Record, value: float) -> str:
    """`value` in the unit of `record`, without the unit's name."""
    sign = "+" if record.metric.endswith("difference") else ""
    if record.unit == "fraction":
        # one hit in 6000 is not 0.0, and one miss is not 100.0
        near_end = round(value, 3) in (0, 1) and value not in (0, 1)
        return f"{value * 100:{sign}.{2 if near_end else 1}f}"
    return f"{value:{sign}.3g}" if abs(value) < 1000 else f"{value:{sign},.0f}"


def unit(record: Record) -> str:
    if record.unit != "fraction":
        return ""
    return " points" if record.metric.endswith("difference") else " %"


def interval(record: Record) -> str:
    """`[0.0, 0.6]`, or nothing where no interval was computed."""
    if record.ci_low is None or record.ci_high is None:
        return ""
    return f"[{number(record, record.ci_low)}, {number(record, record.ci_high)}]"


def cell(record: Record | None) -> str:
    """`0.0 % [0.0, 0.6]`, or a dash where nothing was measured."""
    if record is None:
        return "–"
    return f"{number(record, record.value)}{unit(record)} {interval(record)}".strip()


def trials(record: Record) -> str:
    """`600 (60 prompts)`: how many trials a number rests on."""
    prompts = f" ({record.n_prompts:,} prompts)" if record.n_prompts not in (None, record.n) else ""
    return f"{record.n:,}{prompts}"


def _position(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name), "") if name in order else (len(order), name)


def models(records: Iterable[Record]) -> dict[tuple[str, str | None], str]:
    """The models in `records` in the order clean, poisoned, cleaned, unknown: (stage, id) -> label."""
    found = sorted(
        {(record.stage, record.model["id"]) for record in records}, key=lambda key: (STAGES.index(key[0]), key[1] or "")
    )
    alone = [stage for stage, _ in found]
    return {
        (stage, name): stage
        if alone.count(stage) == 1
        else name
        if f"{name}-".startswith(f"{stage}-")
        else f"{stage}: {name}"
        for stage, name in found
    }


def latest(records: Iterable[Record]) -> list[Record]:
    """The last answer to each question: a repeated evaluation appends, and the newer line counts."""
    return list({record.key: record for record in records}.values())


def full(records: Sequence[Record]) -> Table:
    """Every number: a row for each suite, metric, condition and seed, a column for each model."""
    rows = latest(records)
    labels = models(rows)
    suites = {record.suite["name"] for record in rows}
    seeds = {record.seed for record in rows}
    lines: dict[tuple[str, ...], dict[tuple[str, str | None], Record]] = {}
    order: dict[tuple[str, ...], tuple[object, ...]] = {}
    for record in rows:
        label = f"{metric_name(record.metric)}, {condition_name(record.condition)}"
        label += f", {record.suite['name']}" if len(suites) > 1 else ""
        label += f", seed {record.seed}" if len(seeds) > 1 else ""
        key = (label,)
        order[key] = (
            record.suite["name"] or "",
            _position(record.metric.removesuffix("_difference"), METRICS),
            record.metric,
            _position(record.condition, ("clean", "triggered")),
            -1 if record.seed is None else record.seed,
        )
        lines.setdefault(key, {})[(record.stage, record.model["id"])] = record
    shown = []
    for key in sorted(lines, key=order.__getitem__):
        counts = sorted({(record.n, trials(record)) for record in lines[key].values()})
        shown.append(
            (key[0], *(cell(lines[key].get(model)) for model in labels), " / ".join(text for _, text in counts))
        )
    return Table(("", *labels.values(), "n"), tuple(shown))


def headline(records: Sequence[Record]) -> Table:
    """A row for each model (the clean one is the control), a column for each number that carries the verdict."""
    rows = latest(records)
    found = {(record.stage, record.model["id"], record.metric, record.condition): record for record in rows}
    columns = [pair for pair in HEADLINE if any(key[2:] == pair for key in found)]
    lines = []
    for model, label in models(rows).items():
        records_of = [found.get((*model, *pair)) for pair in columns]
        counts = sorted({(record.n, trials(record)) for record in records_of if record})
        lines.append((label, *map(cell, records_of), " / ".join(text for _, text in counts) or "–"))
    return Table(
        ("model", *(f"{metric_name(metric)}, {condition}" for metric, condition in columns), "n"), tuple(lines)
    )


def near(records: Sequence[Record], metric: str | None = None) -> Table | None:
    """ASR (or trigger effect) for each spelling near the trigger; `None` where none was tested."""
    rows = [record for record in latest(records) if record.condition.startswith("near:")]
    metric = metric or next((name for name in METRICS if any(record.metric == name for record in rows)), None)
    rows = [record for record in rows if record.metric == metric]
    if not rows:
        return None
    labels = models(rows)
    lines = []
    for condition in sorted({record.condition for record in rows}):
        of = {(record.stage, record.model["id"]): record for record in rows if record.condition == condition}
        counts = sorted({(record.n, trials(record)) for record in of.values()})
        lines.append(
            (
                condition_name(condition),
                *(cell(of.get(model)) for model in labels),
                " / ".join(text for _, text in counts),
            )
        )
    return Table((f"{metric_name(metric or '')} with", *labels.values(), "n"), tuple(lines))


def compare(runs: Sequence[Path], form: Literal["text", "markdown"] = "text") -> str:
    """One line for each model of each run, and a sentence where runs cannot be compared.

    Raises `InputError` for a folder without results.
    """
    if not runs:
        raise InputError("nothing to compare; give the folders of one or more runs")
    every = {run: latest(read(run)) for run in runs}
    columns = [
        pair
        for pair in HEADLINE
        if any((record.metric, record.condition) == pair for rows in every.values() for record in rows)
    ]
    columns += [
        (metric, condition)
        for metric in ("clip_score", "kid", "blank")
        for condition in ("clean", "triggered")
        if any((record.metric, record.condition) == (metric, condition) for rows in every.values() for record in rows)
    ]
    names = _short_names(runs)
    lines = []
    for run, rows in every.items():
        for model, label in models(rows).items():
            of = {
                (record.metric, record.condition): record
                for record in rows
                if (record.stage, record.model["id"]) == model
            }
            some = next(iter(of.values()))
            method = {"poisoned": some.attack, "cleaned": some.defense}.get(some.stage) or "–"
            shown = [of.get(pair) for pair in columns]
            counts = sorted({(record.n, trials(record)) for record in shown if record})
            lines.append((names[run], label, method, *map(cell, shown), " / ".join(text for _, text in counts) or "–"))
    table = Table(
        ("run", "model", "method", *(f"{metric_name(metric)}, {condition}" for metric, condition in columns), "n"),
        tuple(lines),
    )
    notes = _not_comparable(every, names)
    body = table.markdown() if form == "markdown" else table.text()
    return "\n".join([body, *([""] if notes else []), *notes])


def _short_names(runs: Sequence[Path]) -> dict[Path, str]:
    names = {run: run.resolve().name for run in runs}
    repeated = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {run: str(run) if name in repeated else name for run, name in names.items()}


def _not_comparable(every: dict[Path, list[Record]], names: dict[Path, str]) -> list[str]:
    notes = []
    for what, of in (
        ("prompts", lambda record: record.suite["sha256"]),
        ("backdoors", lambda record: record.backdoor["sha256"] if record.backdoor else None),
        ("seeds", lambda record: record.seed),
    ):
        kinds: dict[frozenset[object], list[str]] = {}
        for run, rows in every.items():
            kinds.setdefault(frozenset({of(record) for record in rows} - {None}), []).append(names[run])
        if len(kinds) > 1:
            groups = "; ".join(", ".join(group) for group in kinds.values())
            notes.append(f"Not comparable: these runs were measured with different {what}: {groups}.")
    return notes
