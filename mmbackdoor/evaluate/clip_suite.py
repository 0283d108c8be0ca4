"""The whole measurement of CLIP models: the same pictures under the same conditions, as `samples.jsonl` and records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import Doc
from mmbackdoor.evaluate.clip_conditions import Kind, conditions, view
from mmbackdoor.evaluate.clip_data import ClipData, decoded, undecoded
from mmbackdoor.evaluate.clip_embed import Embedded, Job, embed, gather, make_job, share_file
from mmbackdoor.evaluate.clip_summary import Judged, image_path, judge, samples, summarise, target_place
from mmbackdoor.evaluate.entries import Entry
from mmbackdoor.evaluate.maker import Facts
from mmbackdoor.evaluate.zeroshot import ClassPrompts, Precision
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results import gallery, grids
from mmbackdoor.results.record import Record, write_text
from mmbackdoor.results.samples import FILE_NAME as SAMPLES
from mmbackdoor.results.samples import Picture
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.types import InputError, Sample

FOLDER = "embeddings"


@dataclass(frozen=True)
class ClipAmounts:
    num_samples: Annotated[int | None, Field(ge=2), Doc("pictures, picked by a hash of their keys; none: all")] = None
    near: Annotated[tuple[Kind, ...], Doc("kinds of marks near the trigger to try")] = ("codec", "position", "faint")
    near_samples: Annotated[int, Field(ge=1), Doc("pictures for each kind of near trigger")] = 1000
    neighbours: Annotated[int, Field(ge=1), Doc("votes of the nearest-neighbour classification")] = 20
    w1_samples: Annotated[int, Field(ge=2, le=1000), Doc("pictures for the W1 distance; its time grows as n^3")] = 400


@dataclass(frozen=True)
class Panel:
    """What was asked, for the records: the data's name, and a hash of keys, labels, captions, classes and prompts."""

    name: str
    sha256: str


def evaluate_clips(
    models: Mapping[str, Entry],
    data: ClipData,
    classes: ClassPrompts | None,
    backdoor: Backdoor | None,
    *,
    out_dir: Path,
    run_id: str,
    amounts: ClipAmounts = ClipAmounts(),
    seed: int = 0,
    precision: Precision = "no",
    batch_size: int = 64,
    threads: int = 0,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> tuple[list[Record], BadSamples]:
    """Measure `models` (name -> entry) on the same pictures, and the pictures that could not be used.

    Every process embeds its share; rank 0 then judges them, writes `samples.jsonl`, the pictures of the report and
    `grid.png` below `out_dir`, and returns the records (others return none). Raises `InputError` where `classes` lack
    the target or a label of the data.
    """
    if not models:
        raise InputError("no model to measure; give --model")
    target = target_place(classes, backdoor)
    job = make_job(
        data,
        classes,
        conditions(backdoor, amounts.near),
        num_samples=amounts.num_samples,
        near_samples=amounts.near_samples,
        seed=seed,
        precision=precision,
    )
    facts = {}
    for name, entry in models.items():
        sha256 = weights_sha256(entry.folder) if entry.folder is not None else None
        facts[name] = Facts(name, sha256, entry.stage, entry.attack, entry.defense)
        share = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "threads": threads}
        file = share_file(out_dir / FOLDER, name, rank, world_size)
        # Without a hash of the weights nothing says that an older file is of the same model.
        embed(entry.load, sha256 or f"{name} {run_id}", job, file, **share)
    wait()
    if rank != 0:
        return [], BadSamples()
    judged: dict[str, Judged] = {}
    for name in models:
        vectors = gather([share_file(out_dir / FOLDER, name, k, world_size) for k in range(world_size)])
        judged[name] = judge(vectors, classes, target, amounts.neighbours)
    pictures = [line for name, one in judged.items() for line in samples(one, facts[name], classes)]
    write_text(out_dir / SAMPLES, "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in pictures))
    first = next(iter(judged.values())).vectors
    doubts = [doubt for one in judged.values() for doubt in one.vectors.doubts]
    _draw(pictures, job, first.preprocess_cfg, out_dir)
    records = summarise(
        judged,
        facts,
        _panel(data, classes, first),
        backdoor,
        run_id=run_id,
        seed=seed,
        k=amounts.neighbours,
        w1_samples=amounts.w1_samples,
        notices=[*_notices(first.report, len(first.keys)), *doubts],
    )
    for file in (out_dir / FOLDER).glob("*.safetensors"):
        file.unlink()
    (out_dir / FOLDER).rmdir()
    return records, first.report


def _panel(data: ClipData, classes: ClassPrompts | None, vectors: Embedded) -> Panel:
    asked = sorted(zip(vectors.keys, vectors.labels.tolist(), vectors.captions, strict=True))
    content = [asked, vectors.words, classes.sha256 if classes else None]
    return Panel(data.name, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _notices(report: BadSamples, good: int) -> list[str]:
    if not report.total:
        return []
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(report.counts.items()))
    return [f"{report.total} problems with the pictures of --data ({counts}): they were left out, {good} pictures count"]


def _draw(pictures: Sequence[Picture], job: Job, preprocess_cfg: dict[str, Any], out_dir: Path) -> None:
    """The pictures that the report shows, as the first model sees them, and `grid.png`."""
    shown = {place for place, _, _ in gallery.choose(pictures)}
    drawn = [one for one in job.conditions if one.name in gallery.CONDITIONS]
    for _, path, entry in undecoded(job.data, BadSamples(), frozenset(str(key) for key, _ in shown)):
        sample = decoded(path, entry)
        if isinstance(sample, Sample):
            for condition in drawn:
                image = view(preprocess_cfg, sample.image, sample.key, condition, job.seed)
                grids.save(image, out_dir / image_path(condition.name, sample.key))
    rows = [one for one in pictures if (one.prompt_id, one.seed_index) in shown]
    grids.save(grids.sample_grid(out_dir, rows, conditions=[one.name for one in drawn]), out_dir / "grid.png")
