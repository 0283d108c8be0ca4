"""What a defender without the trigger can measure of a cleaned CLIP: accuracy on clean pictures, and how far it moved.

Nothing here takes a backdoor or an evaluation's results: a rule that picks by these numbers cannot have looked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from mmbackdoor.evaluate.clip_data import ClipData, decoded, undecoded
from mmbackdoor.evaluate.metrics.clip_asr import correct, ranked
from mmbackdoor.evaluate.zeroshot import ClassPrompts, class_vectors, image_features
from mmbackdoor.models.clip import ClipModel
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.types import InputError, Sample


@dataclass(frozen=True)
class Selection:
    """Clean pictures (RGB, as stored) with their classes: `labels` int64 (N,), places in `classes.names`. `bad`: those
    that could not be used."""

    images: tuple[Image.Image, ...]
    labels: Tensor
    classes: ClassPrompts
    bad: BadSamples


@dataclass(frozen=True)
class Kept:
    """Where a selection is: the labelled pictures of `data`, with `keys` these alone. Nothing is read before it is
    asked for."""

    data: ClipData
    classes: ClassPrompts
    keys: frozenset[str] | None = None

    @cached_property
    def sha256(self) -> str:
        """Changes with the shards, with the pictures chosen of them, and with the classes and their prompts."""
        chosen = None if self.keys is None else sorted(self.keys)
        facts = [self.data.stamp, chosen, self.classes.sha256, self.classes.index]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def pictures(self) -> Selection:
        return read_selection(self.data, self.classes, self.keys)


def read_selection(data: ClipData, classes: ClassPrompts, keys: frozenset[str] | None = None) -> Selection:
    """The labelled pictures of `data`, with `keys` these alone. Raises `InputError` where there is none, or a label
    without a class name."""
    bad = BadSamples()
    images, labels = [], []
    for _, path, entry in undecoded(data, bad, keys):
        found = decoded(path, entry)
        if not isinstance(found, Sample):
            bad.add_problem(found)
        elif found.label is not None:
            if found.label >= len(classes.index):
                raise InputError(
                    f"the picture {found.key!r} has the label {found.label}, but there are only "
                    f"{len(classes.index)} class names; give those that belong to these pictures"
                )
            images.append(found.image)
            labels.append(classes.index[found.label])
    if not images:
        reasons = "; ".join(bad.lines()) or "none has a label"
        raise InputError(f"no picture of {data.name!r} can be used for selection ({reasons})")
    return Selection(tuple(images), torch.tensor(labels), classes, bad)


@torch.no_grad()
def features(clip: ClipModel, selection: Selection, batch_size: int = 64) -> Tensor:
    """Unit vectors (N, D) of the selection's pictures, fp32 on the CPU."""
    starts = range(0, len(selection.images), batch_size)
    batches: Sequence[Sequence[Image.Image]] = [selection.images[start : start + batch_size] for start in starts]
    return torch.cat([image_features(clip, clip.resize_crop(batch)) for batch in batches])


def utility(clip: ClipModel, vectors: Tensor, selection: Selection) -> float:
    """Zero-shot accuracy on the selection, whose `vectors` are `features` of `clip`."""
    right = correct(ranked(vectors, class_vectors(clip, selection.classes)), selection.labels, 1)
    return sum(right) / len(right)


def drift(vectors: Tensor, before: Tensor) -> float:
    """1 - the mean cosine of the same pictures' vectors in a model and in the one before cleaning."""
    return float(1 - (vectors * before).sum(1).mean())
