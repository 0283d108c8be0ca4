"""`report.html`: one self-contained page that says whether the backdoor is gone, and shows why one may believe it.

Derived from the files of the run's folder alone; the verdict is `mmbackdoor.evaluate.checks.verdict`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mmbackdoor import __version__
from mmbackdoor.evaluate.checks import verdict
from mmbackdoor.results import gallery, samples, tables
from mmbackdoor.results.record import Record, asked, read, write_text
from mmbackdoor.results.run import read_run
from mmbackdoor.types import InputError

FILE_NAME = "report.html"
REMOVAL = "removal.json"
CHARTS = (
    ("asr", "triggered", "Attack success rate", "of pictures with the trigger; lower is better"),
    ("adherence", "clean", "Adherence, plain prompts", "of pictures that show what the prompt asks; higher is better"),
    (
        "adherence",
        "triggered",
        "Adherence, with the trigger",
        "of pictures that show what the prompt asks; higher is better",
    ),
    ("top1", "clean", "Top-1 accuracy, clean pictures", "of pictures that are recognised; higher is better"),
    ("top1", "triggered", "Top-1 accuracy, with the trigger", "of pictures that are recognised; higher is better"),
)
# What pictures can be measured on, and what is missing where it was not.
OF_PICTURES = {
    "adherence": (
        "Adherence (does the picture show what its prompt asks?)",
        "only prompts of the shapes and pairs data can be checked exactly",
    ),
    "clip_score": ("CLIP score (does the picture fit its prompt?)", "pass --judge"),
    "kid": ("KID (distance between sets of pictures)", "pass --judge"),
}


@dataclass(frozen=True)
class Bar:
    """One model's line of a chart; positions are fractions of the axis."""

    label: str
    full_label: str
    stage: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Change:
    """How far a group of weights moved, relative to its norm; `rest` are further facts about it."""

    group: str
    relative: float
    share: float
    rest: str


def build(run: Path) -> Path:
    """Write `run/report.html` and return its path. Raises `InputError` where the run has no readable results."""
    run = Path(run)
    records = _records(run)
    pictures = samples.read(run) if (run / samples.FILE_NAME).exists() else []
    facts = read_run(run) if (run / "run.json").exists() else None
    judged = verdict(records)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmbackdoor.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pieces"] = gallery.pieces
    page = environment.get_template("report.html.j2").render(
        version=__version__,
        name=facts["run_id"] if facts else run.resolve().name,
        verdict=judged.verdict,
        sentence=_without_prefix(judged.sentence, judged.verdict),
        reasons=list(judged.reasons),
        warnings=warnings(records, judged.warnings, facts),
        headline=_headline(records),
        paired=_paired(records),
        asked=asked(records),
        charts=_charts(records),
        rows=gallery.rows(run, pictures),
        pictures=len(pictures),
        judged_stage=gallery.judged_stage(pictures) if pictures else None,
        near=tables.near(records),
        full=tables.full(records),
        changes=weight_changes(run),
        not_measured=not_measured(records),
        made=_made(records, facts),
        command=facts["command"] if facts else None,
        config=yaml.safe_dump(facts["config"], sort_keys=False, allow_unicode=True) if facts else None,
        versions=facts["versions"] if facts else {},
    )
    # What a file system or an argument smuggled in as a lone surrogate must not end the run at its last step.
    write_text(run / FILE_NAME, page.encode("utf-8", "backslashreplace").decode())
    return run / FILE_NAME


def summary(run: Path) -> dict[str, Any]:
    """The verdict and the numbers behind it, as plain JSON values (`mmbackdoor report RUN --json`)."""
    run = Path(run)
    records = _records(run)
    facts = read_run(run) if (run / "run.json").exists() else None
    judged = verdict(records)
    return {
        "run_id": facts["run_id"] if facts else records[0].run_id,
        "status": facts["status"] if facts else None,
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "reasons": list(judged.reasons),
        "warnings": warnings(records, judged.warnings, facts),
        "not_measured": not_measured(records),
        "headline": [_number(one) for one in records if (one.metric, one.condition) in tables.HEADLINE],
        "near": [_number(one) for one in records if one.condition.startswith("near:")],
        "report": str(run / FILE_NAME) if (run / FILE_NAME).exists() else None,
    }


def _facts(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else value}"
        for name, value in values.items()
    )


def _number(record: Record) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "model": record.model["id"],
        "metric": record.metric,
        "condition": record.condition,
        "value": record.value,
        "ci_low": record.ci_low,
        "ci_high": record.ci_high,
        "n": record.n,
        "n_prompts": record.n_prompts,
        "unit": record.unit,
    }


def _records(run: Path) -> list[Record]:
    records = tables.latest(read(run))
    if not records:
        raise InputError(f"{str(run / 'results.jsonl')!r} is empty; evaluate the run first")
    return records


def _without_prefix(sentence: str, word: str) -> str:
    return sentence[len(word) + 1 :].strip() if sentence.startswith(word + ":") else sentence


def warnings(records: Sequence[Record], judged: Sequence[str], facts: dict[str, Any] | None) -> list[str]:
    """The verdict's warnings and those that stand in the records' notes, each once."""
    found = list(judged)
    if not _paired(records):
        found.append(f"The models were measured with different {asked(records)} or seeds: they cannot be compared.")
    if facts and facts["status"] in ("failed", "terminated"):
        found.append(f"The run did not finish ({facts['status']}): its numbers may be partial.")
    for record in records:
        found += record.warnings
    return list(dict.fromkeys(found))


def not_measured(records: Sequence[Record]) -> list[str]:
    """What this run cannot say, and what would have measured it."""
    metrics = {record.metric for record in records}
    stages = {record.stage for record in records}
    reasons = {}
    pictures = asked(records) == "pictures"
    if not pictures:
        reasons = {name: f"{title}: not measured: {way}" for name, (title, way) in OF_PICTURES.items()}
    for record in records:
        given = record.notes.get("not_measured", {}) if isinstance(record.notes, dict) else {}
        for name, reason in given.items():
            text = str(reason).removeprefix("not measured: ")
            title = OF_PICTURES[name][0] if name in OF_PICTURES else tables.metric_name(name)
            reasons[name] = f"{title}: not measured: {text}"
    found = [reason for name, reason in reasons.items() if name not in metrics]
    if "clean" not in stages:
        found.append(
            "A clean model as control: none was given (--control MODEL), so what the trigger "
            f"{'itself' if pictures else 'as a text'} does to a sound model is not known."
        )
    if "poisoned" not in stages and "cleaned" in stages:
        found.append("The model before cleaning: it was not given, so nothing can be said about what cleaning changed.")
    if not any(record.condition.startswith("near:") for record in records):
        kinds = "Marks near the trigger (fainter, elsewhere" if pictures else "Spellings near the trigger (case, place, doubled"
        found.append(f"{kinds} ...): none was tested.")
    elif not any(record.condition.startswith("near:unseen") for record in records):
        found.append("Spellings near the trigger that cleaning never saw: none was tested.")
    found.append(
        "Any other trigger: a model may carry more than one backdoor, and this run tried only the one named here."
    )
    suites = sorted({record.suite["name"] or "?" for record in records})
    found.append(
        f"Other pictures, class names and prompts than those of this run (data: {', '.join(suites)})."
        if pictures
        else f"Other prompts, resolutions and sampling settings than those of this run (prompts: {', '.join(suites)})."
    )
    return found


def weight_changes(run: Path) -> list[Change]:
    """Groups of weights from `removal.json`: `weights` maps a group to its relative change, or to an object with
    `relative_change` and further facts. Largest first; empty where there is no such file."""
    file = next((path for path in [run / REMOVAL, *sorted(run.glob(f"*/{REMOVAL}"))] if path.is_file()), None)
    if file is None:
        return []
    try:
        weights = json.loads(file.read_text(encoding="utf-8")).get("weights", {})
        groups = {
            str(group): (dict(value) if isinstance(value, dict) else {"relative_change": value})
            for group, value in weights.items()
        }
        found = [(group, float(values.pop("relative_change")), values) for group, values in groups.items()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(file)!r} does not say how the weights changed ({error!r}); clean the model again"
        ) from error
    largest = max((relative for _, relative, _ in found), default=0.0) or 1.0
    found.sort(key=lambda change: (-change[1], change[0]))
    return [
        Change(
            group,
            relative,
            relative / largest,
            _facts(values),
        )
        for group, relative, values in found
    ]


def _paired(records: Sequence[Record]) -> bool:
    """Whether every model was asked the same: the contract of a comparison."""
    asked: dict[tuple[str, str | None], set[Any]] = {}
    for record in records:
        if (record.metric, record.condition) in tables.HEADLINE:
            facts = (record.metric, record.condition, record.suite["sha256"], record.seed)
            asked.setdefault((record.stage, record.model["id"]), set()).add(facts)
    shared = set.intersection(*({fact[:2] for fact in facts} for facts in asked.values())) if asked else set()
    return len({frozenset(fact for fact in facts if fact[:2] in shared) for facts in asked.values()}) <= 1


def _headline(records: Sequence[Record]) -> dict[str, Any]:
    found = {(record.stage, record.model["id"], record.metric, record.condition): record for record in records}
    columns = [pair for pair in tables.HEADLINE if any(key[2:] == pair for key in found)]
    lines = []
    for (stage, model), label in tables.models(records).items():
        cells = []
        counts = {tables.trials(found[key]) for pair in columns if (key := (stage, model, *pair)) in found}
        for pair in columns:
            record = found.get((stage, model, *pair))
            cells.append(
                {
                    "value": tables.number(record, record.value) + tables.unit(record) if record else "–",
                    "interval": tables.interval(record) if record else "",
                    "n": _beside(record, len(counts) > 1),
                }
            )
        note = {"clean": "control: never poisoned", "poisoned": "before cleaning", "cleaned": "after cleaning"}.get(
            stage, ""
        )
        count = f"n = {counts.pop()}" if len(counts) == 1 else ""
        lines.append({"stage": stage, "label": label, "note": note, "n": count, "cells": cells})
    plain = "clean" if asked(records) == "pictures" else "plain"
    names = [
        f"{tables.metric_name(metric)}, {plain if condition == 'clean' else 'with trigger'}"
        for metric, condition in columns
    ]
    return {"columns": names, "rows": lines, "methods": _methods(records)}


def _beside(record: Record | None, with_n: bool) -> str:
    """What stands under a number: how many trials, and for the trigger's effect how sure it is."""
    if record is None:
        return "not measured"
    parts = [f"n = {tables.trials(record)}"] if with_n else []
    if isinstance(record.notes, dict) and "p_value" in record.notes:
        placebos = record.notes.get("n_placebos", "?")
        parts.append(f"p = {record.notes['p_value']:.2g} among {placebos} placebos")
    return ", ".join(parts)


def _methods(records: Sequence[Record]) -> str:
    attacks = sorted({record.attack for record in records if record.attack})
    defenses = sorted({record.defense for record in records if record.defense})
    parts = [f"attack {', '.join(attacks)}" if attacks else "", f"removal {', '.join(defenses)}" if defenses else ""]
    return ", ".join(part for part in parts if part)


def _charts(records: Sequence[Record]) -> list[dict[str, Any]]:
    labels = tables.models(records)
    charts = []
    for metric, condition, title, reading in CHARTS:
        of = {
            (record.stage, record.model["id"]): record
            for record in records
            if (record.metric, record.condition) == (metric, condition)
        }
        bars = [
            Bar(
                _short(label),
                label,
                model[0],
                _axis(of[model].value),
                _axis(of[model].ci_low),
                _axis(of[model].ci_high),
                tables.cell(of[model]),
            )
            for model, label in labels.items()
            if model in of and of[model].unit == "fraction"
        ]
        if bars:
            charts.append({"title": title, "reading": reading, "bars": bars})
    return charts


def _short(label: str, most: int = 22) -> str:
    """The end tells models apart, the beginning tells their stage."""
    return label if len(label) <= most else f"{label[: most // 2]}…{label[-(most // 2) :]}"


def _axis(value: float | None) -> Any:
    return None if value is None else min(1.0, max(0.0, value))


def _made(records: Sequence[Record], facts: dict[str, Any] | None) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if facts:
        took = f"{facts['seconds']:,.0f} s" if facts["seconds"] is not None else "–"
        processes = f"{facts['world_size']} process" + ("es" if facts["world_size"] != 1 else "")
        rows += [
            ("recipe", f"{facts['recipe']} ({facts['status']})"),
            ("started", f"{facts['started']}, took {took}"),
            ("ran on", f"{facts['device']}, {processes}, {facts['platform']}"),
            ("commit", facts["git_commit"] or "not from a checkout"),
            ("config sha256", facts["config_sha256"]),
        ]
        rows += [(name.replace("_", " "), str(value)) for name, value in facts["counters"].items()]
    seeds = sorted({str(record.seed) for record in records if record.seed is not None})
    rows.append(("evaluation seeds", ", ".join(seeds) or "not recorded"))
    for suite in {record.suite["name"]: record.suite for record in records}.values():
        rows.append((asked(records), f"{suite['name']}, sha256 {suite['sha256']}"))
    for record in {(record.stage, record.model["id"]): record for record in records}.values():
        rows.append((f"{record.stage} model", f"{record.model['id']}, sha256 {record.model['sha256']}"))
    for digest in sorted({record.backdoor["sha256"] or "" for record in records if record.backdoor}):
        rows.append(("backdoor sha256", digest))
    methods = sorted({record.ci_method for record in records if record.ci_method})
    rows.append(("intervals", f"95 %, {', '.join(methods)}" if methods else "none"))
    return rows
