"""What a CLIP makes of the pictures of an evaluation: unit vectors of each under each condition, and of the texts.

Every process embeds its share and writes it to a file of its own; one process reads them all. A share that was
written for the same model, pictures, texts and conditions before is not made again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mmbackdoor.evaluate.clip_conditions import Condition, view
from mmbackdoor.evaluate.clip_data import ClipData, chosen_keys, decoded, highest_label, undecoded
from mmbackdoor.evaluate.zeroshot import ClassPrompts, Precision, class_vectors, doubts, image_features, text_features
from mmbackdoor.models.clip import ClipModel
from mmbackdoor.shards.bad import BadSamples, Problem
from mmbackdoor.shards.read import Entry
from mmbackdoor.types import InputError, Sample

FACTS = "facts"


@dataclass(frozen=True)
class Job:
    """All that decides the vectors, apart from the model. `near_keys`: pictures of the near conditions, `None`: all."""

    data: ClipData
    classes: ClassPrompts | None
    conditions: tuple[Condition, ...]
    keys: frozenset[str] | None
    near_keys: frozenset[str] | None
    seed: int
    precision: Precision = "no"

    def wants(self, condition: Condition, key: str) -> bool:
        return not condition.name.startswith("near:") or self.near_keys is None or key in self.near_keys

    def stamp(self, model: str) -> str:
        """A name for the vectors that `model` (a hash of its weights) has of this."""
        facts = [model, self.data.stamp, self.classes and self.classes.sha256, self.seed, self.precision]
        marks = [(one.name, one.backdoor and one.backdoor.sha256, one.squash) for one in self.conditions]
        keys = [sorted(keys) if keys is not None else None for keys in (self.keys, self.near_keys)]
        return hashlib.sha256(json.dumps([facts, marks, keys]).encode()).hexdigest()


@dataclass(frozen=True)
class Embedded:
    """One model's vectors, all fp32 on the CPU and of length 1. Pictures are in the order of the shards.

    `images[condition]` (M, D) belong to the pictures `rows[condition]`; `labels` (N,) are classes, -1 where there is
    none; `captions` are, for each picture, places in `texts` (T, D), whose words are `words`; `doubts` are sentences on
    how the model reads.
    """

    keys: tuple[str, ...]
    labels: Tensor
    captions: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]
    images: dict[str, Tensor]
    rows: dict[str, Tensor]
    texts: Tensor
    classes: Tensor | None
    preprocess_cfg: dict[str, Any]
    doubts: tuple[str, ...] = ()
    report: BadSamples = field(default_factory=BadSamples)


def make_job(
    data: ClipData,
    classes: ClassPrompts | None,
    conditions: tuple[Condition, ...],
    *,
    num_samples: int | None,
    near_samples: int,
    seed: int,
    precision: Precision = "no",
) -> Job:
    """`num_samples` pictures (`None`: all), `near_samples` of them under the near conditions, by a hash of the key.

    Raises `InputError` for a label that has no class name.
    """
    if classes is not None:
        check_label(classes, *highest_label(data))
    near = chosen_keys(data, min(near_samples, num_samples or near_samples), seed)
    return Job(data, classes, conditions, chosen_keys(data, num_samples, seed), near, seed, precision)


def check_label(classes: ClassPrompts | None, highest: int, key: str) -> None:
    """Raises `InputError` where the `highest` label of the data, that of the picture `key`, has no class name."""
    if classes is not None and highest >= len(classes.index):
        raise InputError(
            f"the picture {key!r} has the label {highest}, but there are {len(classes.index)} class names (labels "
            "from 0); give the --classnames that belong to this data"
        )


def share_file(folder: Path, name: str, rank: int, world_size: int) -> Path:
    return folder / f"{name}-{rank}-of-{world_size}.safetensors"


def embed(
    load: Callable[[], ClipModel],
    model_stamp: str,
    job: Job,
    file: Path,
    *,
    batch_size: int,
    threads: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write this process's share of the vectors to `file`, unless it is there. The first one adds the classes."""
    stamp = job.stamp(model_stamp)
    if _facts(file).get("stamp") == stamp:
        return
    clip, report = load(), BadSamples(keep_all=True)
    images: dict[str, list[Tensor]] = {condition.name: [] for condition in job.conditions}
    rows: dict[str, list[int]] = {condition.name: [] for condition in job.conditions}
    places, keys, labels, captions = [], [], [], []

    def prepared(found: tuple[int, str, Entry]) -> tuple[int, Sample, dict[str, Image.Image]] | Problem:
        place, path, entry = found
        sample = decoded(path, entry)
        if isinstance(sample, Problem):
            return sample
        views = {
            one.name: view(clip.preprocess_cfg, sample.image, sample.key, one, job.seed)
            for one in job.conditions
            if job.wants(one, sample.key)
        }
        return place, sample, views

    mine = undecoded(job.data, report, job.keys, rank, world_size)
    with ThreadPoolExecutor(threads) if threads else nullcontext() as pool, torch.inference_mode():
        bar = tqdm(desc=f"pictures of {file.stem}", unit="", disable=None if rank == 0 else True)
        for batch in _batches(mine, batch_size):
            found = list(pool.map(prepared, batch) if pool else map(prepared, batch))
            for problem in (one for one in found if isinstance(one, Problem)):
                report.add_problem(problem)
            done = [one for one in found if not isinstance(one, Problem)]
            start = len(places)
            for place, sample, _ in done:
                places.append(place)
                keys.append(sample.key)
                labels.append(-1 if sample.label is None else sample.label)
                captions.append(job.data.captions(sample))
            for condition in images:
                seen = [(start + number, views) for number, (_, _, views) in enumerate(done)]
                crops = [(row, views[condition]) for row, views in seen if condition in views]
                if crops:
                    rows[condition] += [row for row, _ in crops]
                    images[condition].append(image_features(clip, [crop for _, crop in crops], job.precision))
            bar.update(len(batch))
        bar.close()
        words = sorted({text for some in captions for text in some})
        tensors = {"places": torch.tensor(places, dtype=torch.int64), "labels": torch.tensor(labels, dtype=torch.int64)}
        if words:
            tensors["texts"] = text_features(clip, words, job.precision)
        if rank == 0 and job.classes is not None:
            tensors["classes"] = class_vectors(clip, job.classes, job.precision)
    for condition, parts in images.items():
        if parts:
            tensors[f"image/{condition}"] = torch.cat(parts)
            tensors[f"rows/{condition}"] = torch.tensor(rows[condition], dtype=torch.int64)
    facts = {
        "stamp": stamp,
        "keys": keys,
        "captions": captions,
        "words": words,
        "doubts": doubts(clip, job.classes) if rank == 0 and job.classes is not None else [],
        "problems": [tuple(problem) for some in report.examples.values() for problem in some],
        "preprocess_cfg": {name: clip.preprocess_cfg[name] for name in sorted(clip.preprocess_cfg)},
    }
    part = file.with_name(file.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, part, metadata={FACTS: json.dumps(facts)})
    part.replace(file)


def _batches(found: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(found, size)):
        yield batch


def _facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {}).get(FACTS, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}


def gather(files: Sequence[Path]) -> Embedded:
    """The shares of all processes as one. Raises `InputError` where no picture could be read."""
    shares = []
    for file in files:
        with safe_open(file, "pt") as opened:
            shares.append((_facts(file), {name: opened.get_tensor(name) for name in opened.keys()}))
    report = BadSamples(keep_all=True)
    for facts, _ in shares:
        for problem in facts["problems"]:
            report.add_problem(Problem(*problem))
    places = torch.cat([tensors["places"] for _, tensors in shares])
    if not len(places):
        found = "; ".join(report.lines()) or "the shards are empty"
        raise InputError(f"none of the pictures of --data can be used: {found}")
    order = places.argsort()
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(len(order))
    keys = [key for facts, _ in shares for key in facts["keys"]]
    words = sorted({text for facts, _ in shares for text in facts["words"]})
    number = {text: place for place, text in enumerate(words)}
    captions = [tuple(number[text] for text in some) for facts, _ in shares for some in facts["captions"]]
    texts: dict[str, Tensor] = {}
    for facts, tensors in shares:
        texts |= zip(facts["words"], tensors.get("texts", ()), strict=True)
    images, rows = {}, {}
    for name in dict.fromkeys(name for _, tensors in shares for name in tensors if name.startswith("image/")):
        start, parts, at = 0, [], []
        for _, tensors in shares:
            if name in tensors:
                parts.append(tensors[name])
                at.append(row_of[tensors[name.replace("image/", "rows/", 1)] + start])
            start += len(tensors["places"])
        joined = torch.cat(at)
        condition = name.removeprefix("image/")
        rows[condition] = joined.sort().values
        images[condition] = torch.cat(parts)[joined.argsort()]
    return Embedded(
        keys=tuple(keys[place] for place in order.tolist()),
        labels=torch.cat([tensors["labels"] for _, tensors in shares])[order],
        captions=tuple(captions[place] for place in order.tolist()),
        words=tuple(words),
        images=images,
        rows=rows,
        texts=torch.stack([texts[text] for text in words]) if words else torch.empty(0, 0),
        classes=shares[0][1].get("classes"),
        preprocess_cfg=shares[0][0]["preprocess_cfg"],
        doubts=tuple(shares[0][0]["doubts"]),
        report=report,
    )
