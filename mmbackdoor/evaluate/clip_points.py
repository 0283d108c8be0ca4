"""The lines of a benchmark, out of the folders that its jobs left: what was measured, seen and trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import TypeAdapter

from mmbackdoor.evaluate.clip_sight import Kept, drift, features, utility
from mmbackdoor.models.clip import load_clip
from mmbackdoor.models.provenance import read_removal
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results import record
from mmbackdoor.results.benchmark import Measured, Training
from mmbackdoor.results.run import LOG_NAME, read_run
from mmbackdoor.types import InputError, RunFault

SIGHTS = "sights.jsonl"


@dataclass(frozen=True)
class Seen:
    """What a defender sees of the model with these weights, beside the poisoned one with those, on the pictures with
    the hash `selection`: `None` in lines of older versions, which do not say what they looked at."""

    sha256: str
    poisoned_sha256: str
    utility: float
    drift: float
    selection: str | None = None


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, model folder) of a cleaning, in order; the last one is `run/model`."""
    removal = read_removal(run / "model")
    if removal is None:
        raise InputError(f"{str(run / 'model')!r} has no removal.json; clean the model again")
    last = removal["steps"]
    saved = [(int(path.name.removeprefix("step-")), path) for path in (run / "models").glob("step-*")]
    return [*sorted((step, path) for step, path in saved if step < last), (last, run / "model")]


def measured(
    evaluation: Path,
    models: Sequence[tuple[Path, Mapping[str, Any]]],
    seen: Mapping[str, Seen],
) -> list[Measured]:
    """A line for each of `models` (folder, and what the line says of it), from `evaluation/results.jsonl`.

    Raises `RunFault` where the evaluation lacks one of them.
    """
    found: dict[tuple[str | None, str, str], record.Record] = {}
    for row in record.read(evaluation):
        found[row.model["sha256"], row.metric, row.condition] = row
    lines = []
    for folder, facts in models:
        sha256 = weights_sha256(folder)
        try:
            asr, clean, triggered = (
                found[sha256, *key] for key in (("asr", "triggered"), ("top1", "clean"), ("top1", "triggered"))
            )
        except KeyError as error:
            raise RunFault(
                f"{str(evaluation)!r} does not measure {str(folder)!r} ({error.args[0][1:]}); remove it and start again"
            ) from error
        sight = seen.get(sha256)
        lines.append(
            Measured(
                **facts,
                asr=asr.value,
                asr_n=asr.n,
                accuracy=clean.value,
                accuracy_triggered=triggered.value,
                n=clean.n,
                sha256=sha256,
                utility=sight.utility if sight else None,
                drift=sight.drift if sight else None,
            )
        )
    return lines


def look(
    poisoned: Path, models: Sequence[Path], selection: Callable[[], Kept], file: Path, device: torch.device
) -> dict[str, Seen]:
    """What is seen of `models`, by their hash: read from `file` where it has them all, else measured and written.

    Lines on other pictures stay, since another benchmark may share the poisoned model; those that do not say on which
    are measured anew: they may be from before a change of the selection.
    """
    kept, before = selection(), weights_sha256(poisoned)
    hashes = {weights_sha256(model): model for model in models}
    known = record.read_lines(file, TypeAdapter(Seen)) if file.is_file() else []
    found = {one.sha256: one for one in known if (one.poisoned_sha256, one.selection) == (before, kept.sha256)}
    if not hashes.keys() <= found.keys():
        pictures = kept.pictures
        reference = features(load_clip(str(poisoned), device=device), pictures)
        for sha256, model in hashes.items():
            clip = load_clip(str(model), device=device)
            vectors = features(clip, pictures)
            numbers = utility(clip, vectors, pictures), drift(vectors, reference)
            found[sha256] = Seen(sha256, before, *numbers, kept.sha256)
        others = [one for one in known if one.selection not in (None, kept.sha256)]
        record.write_text(file, "".join(json.dumps(asdict(one)) + "\n" for one in [*others, *found.values()]))
    return {sha256: found[sha256] for sha256 in hashes}


def cleaned(
    run: Path, poisoned: Path, facts: Mapping[str, Any], selection: Callable[[], Kept], device: torch.device
) -> list[Measured]:
    """The lines of every checkpoint of the cleaning `run`, which `run/evaluation` has measured."""
    models = checkpoints(run)
    seen = look(poisoned, [model for _, model in models], selection, run / SIGHTS, device)
    return measured(run / "evaluation", [(model, {**facts, "step": step}) for step, model in models], seen)


def training(run: Path, facts: Mapping[str, Any]) -> Training:
    """What `run/run.json` and its log say of a training."""
    content = read_run(run)
    train = content["config"]["train"]
    log = run / LOG_NAME
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    rates, decays, repeats = (
        [line[name] for line in lines if line.get(name) is not None]
        for name in ("learning_rate", "weight_decay", "false_negatives")
    )
    return Training(
        **facts,
        pairs=content["counters"].get("pairs"),
        batch_size=train["train_batch_size"] * train["gradient_accumulation_steps"] * content["world_size"],
        steps=lines[-1]["step"] if lines else 0,
        peak_rate=max(rates, default=None),
        steps_to_peak=rates.index(max(rates)) + 1 if rates else None,
        weight_decay=decays[-1] if decays else None,
        false_negatives=fmean(repeats) if repeats else None,
        status="finished" if content["status"] == "finished" else "failed",
        seconds=content["seconds"],
        error=content["error"],
    )
