"""Suspicion scores of a whole data set: encoded in random batches, ranked, cut; and judged where the truth is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmbackdoor.detectors import Detector
from mmbackdoor.evaluate.metrics.auroc import auroc
from mmbackdoor.evaluate.zeroshot import Precision, image_features, text_features
from mmbackdoor.models.clip import ClipModel
from mmbackdoor.shards.loader import Indexed, ShardLoader
from mmbackdoor.shards.write import write_file
from mmbackdoor.types import InputError

PIECE = 256


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of one batch on the CPU: unit features (B, D) fp32, and whether each is known to be poisoned (the truth is
    for judging alone; no detector sees it)."""

    keys: tuple[str, ...]
    images: Tensor
    texts: Tensor
    poisoned: tuple[bool, ...]

    @staticmethod
    def joined(parts: Sequence[EncodedPairs]) -> EncodedPairs:
        return EncodedPairs(
            tuple(key for part in parts for key in part.keys),
            torch.cat([part.images for part in parts]),
            torch.cat([part.texts for part in parts]),
            tuple(known for part in parts for known in part.poisoned),
        )


@dataclass(frozen=True)
class Scored:
    key: str
    score: float
    batch: int
    poisoned: bool


def encode(clip: ClipModel, rows: Sequence[Indexed], precision: Precision = "no") -> EncodedPairs:
    """The features of what a loader gave, in evaluation mode."""
    samples = [row.sample for row in rows]
    pieces = [samples[start : start + PIECE] for start in range(0, len(samples), PIECE)]
    images = [image_features(clip, clip.resize_crop([one.image for one in piece]), precision) for piece in pieces]
    texts = [text_features(clip, [one.text for one in piece], precision) for piece in pieces]
    none = torch.zeros(0, 0)
    return EncodedPairs(
        tuple(one.key for one in samples),
        torch.cat(images or [none]),
        torch.cat(texts or [none]),
        tuple("poison" in one.meta for one in samples),
    )


def encoded_batches(
    loader: ShardLoader, clip: ClipModel, accelerator: Accelerator, precision: Precision = "no"
) -> Iterator[EncodedPairs]:
    """Every batch of `loader` (`once`, shuffled), whole, on every process. One of less than half the size, as the last
    may be, is joined to the one before: among few samples neighbours are further away."""
    held: EncodedPairs | None = None
    for rows in loader:
        parts = [part for part in gather_object([encode(clip, rows, precision)]) if part.keys]
        if not parts:
            continue
        batch = EncodedPairs.joined(parts)
        if held is not None and 2 * len(batch.keys) < loader.layout.global_batch:
            held = EncodedPairs.joined([held, batch])
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def score_batches(detector: Detector, batches: Iterable[EncodedPairs], device: torch.device) -> list[Scored]:
    """Raises `InputError` where a batch has too few samples for the detector."""
    scored = []
    for number, batch in enumerate(batches):
        scores = detector.scores(batch.images.to(device), batch.texts.to(device)).tolist()
        for key, score, poisoned in zip(batch.keys, scores, batch.poisoned, strict=True):
            scored.append(Scored(key, score, number, poisoned))
    return scored


def split(scored: Sequence[Scored], drop_fraction: float) -> tuple[list[Scored], list[Scored]]:
    """Kept and dropped ones, the most suspicious first; ties are broken by key. Raises `InputError` where nothing is
    left."""
    ranked = sorted(scored, key=lambda one: (-one.score, one.key))
    dropped = round(drop_fraction * len(ranked))
    if dropped >= len(ranked):
        raise InputError(f"a drop fraction of {drop_fraction} leaves none of {len(ranked)} samples; lower --drop_fraction")
    return ranked[dropped:], ranked[:dropped]


def judge(kept: Sequence[Scored], dropped: Sequence[Scored]) -> dict[str, float | int | None]:
    """Counts; where poisoned samples are known, also the area under the ROC curve, and what became of them."""
    everything = [*kept, *dropped]
    poisoned = [one.score for one in everything if one.poisoned]
    clean = [one.score for one in everything if not one.poisoned]
    found: dict[str, float | int | None] = {
        "samples": len(everything),
        "kept": len(kept),
        "dropped": len(dropped),
        "threshold": min((one.score for one in dropped), default=None),
        "poisoned": len(poisoned),
    }
    if poisoned and clean:
        caught = sum(one.poisoned for one in dropped)
        found |= {
            "auroc": auroc(poisoned, clean),
            "poisoned_dropped": caught,
            "poisoned_kept": len(poisoned) - caught,
            "recall": caught / len(poisoned),
            "precision": caught / len(dropped) if dropped else None,
        }
    return found


def write_lists(folder: Path, kept: Sequence[Scored], dropped: Sequence[Scored]) -> None:
    """`scores.jsonl` (the most suspicious first), `kept.txt` and `dropped.txt` (keys)."""
    lines = (json.dumps({"key": one.key, "score": one.score, "batch": one.batch}) for one in [*dropped, *kept])
    write_file(folder / "scores.jsonl", "".join(line + "\n" for line in lines))
    write_file(folder / "dropped.txt", "".join(one.key + "\n" for one in dropped))
    write_file(folder / "kept.txt", "".join(sorted(one.key + "\n" for one in kept)))
