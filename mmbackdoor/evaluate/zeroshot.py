"""Zero-shot classes: names, prompts of one's own, and what a CLIP makes of them.

Everything here scores in evaluation mode, whatever mode the network was left in: in training mode BatchNorm scores a
picture by its neighbours, and an attack rate of 1.0 reads as 0.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from mmbackdoor.models import imagenet_prompts
from mmbackdoor.models.clip import ClipModel
from mmbackdoor.models.clip_pooling import pooled_elsewhere
from mmbackdoor.types import InputError

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PLACES = ("{}", "{c}")
LARGEST_FILE = 64 * 2**20
Templates = tuple[str, ...] | Mapping[str, tuple[str, ...]]
"""Texts with `{}` (or `{c}`) where the class name stands, or every class's own prompts by its name."""


@dataclass(frozen=True)
class ClassPrompts:
    """Distinct class `names`, the prompts of each, and `index`: the name of every label of the data (ImageNet has two
    names twice; such classes cannot be told apart by a text and count as one)."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    index: tuple[int, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.names, self.prompts]).encode()).hexdigest()

    def place(self, name: str) -> int:
        """The number of the class `name`, whatever its case and outer space. Raises `InputError` where it is missing."""
        plain = [known.strip().casefold() for known in self.names]
        if name.strip().casefold() in plain:
            return plain.index(name.strip().casefold())
        close = get_close_matches(name, self.names, 3, 0.5)
        hint = f" (near it: {', '.join(close)})" if close else ""
        raise InputError(
            f"the target {name!r} is none of the {len(self.names)} class names{hint}, so no picture could be taken for "
            "it; give --classnames with it, or --add_target_class to have it as one class more"
        )

    def with_class(self, name: str, prompts: Sequence[str]) -> ClassPrompts:
        """These and the class `name`, which no picture has; the same where it is there already."""
        if name.strip().casefold() in (known.strip().casefold() for known in self.names):
            return self
        return ClassPrompts((*self.names, name), (*self.prompts, tuple(prompts)), self.index)


def class_prompts(classnames: Sequence[str], templates: Templates) -> ClassPrompts:
    """Raises `InputError` for a template without a place for the name, and for names without prompts."""
    names = tuple(dict.fromkeys(classnames))
    if len(names) < 2:
        raise InputError(f"{len(names)} class names leave nothing to choose from; give at least two different ones")
    if isinstance(templates, Mapping):
        missing = [name for name in names if not templates.get(name)]
        if missing:
            raise InputError(f"{len(missing)} of {len(names)} classes have no prompts, the first is {missing[0]!r}")
        prompts = tuple(tuple(templates[name]) for name in names)
    else:
        check_templates(templates)
        prompts = tuple(fill(templates, name) for name in names)
    return ClassPrompts(names, prompts, tuple(names.index(name) for name in classnames))


def check_templates(templates: Sequence[str]) -> None:
    wrong = [text for text in templates if not any(place in text for place in PLACES)]
    if wrong or not templates:
        shown = repr(wrong[0]) if wrong else "an empty list"
        raise InputError(f"{shown} is no template: write '{{}}' (or '{{c}}') where the class name stands")


def fill(templates: Sequence[str], name: str) -> tuple[str, ...]:
    # Not str.format: a template may hold other braces.
    return tuple(dict.fromkeys(text.replace(PLACES[1], PLACES[0]).replace(PLACES[0], name) for text in templates))


def _json(path: str, what: str) -> Any:
    file = Path(path)
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise InputError(f"the {what} file {path!r} is larger than {LARGEST_FILE >> 20} MiB")
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"the {what} file {path!r} is no readable JSON ({error})") from error


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def read_classnames(source: str) -> tuple[str, ...]:
    """`imagenet`, or a JSON file: a list of names in the order of the labels, or an object of label -> name."""
    if source == "imagenet":
        return tuple(imagenet_prompts.imagenet_classnames())
    content = _json(source, "class names")
    if isinstance(content, dict):
        if sorted(content) != sorted(map(str, range(len(content)))):
            last = len(content) - 1
            raise InputError(f"the class names {source!r} need the keys '0' .. '{last}', one for each label")
        content = [content[str(label)] for label in range(len(content))]
    if not _texts(content):
        raise InputError(f"the class names {source!r} are no list of texts; write one name for each label")
    return tuple(content)


def read_templates(source: str) -> Templates:
    """`openai`, `simple`, or a JSON file: a list of templates, or an object of class name -> its own prompts."""
    if source in imagenet_prompts.TEMPLATES:
        return tuple(imagenet_prompts.templates(source))
    content = _json(source, "templates")
    if isinstance(content, dict) and content and all(map(_texts, content.values())):
        return {name: tuple(prompts) for name, prompts in content.items()}
    if not _texts(content):
        raise InputError(f"the templates {source!r} are neither a list of texts nor prompts by class name")
    check_templates(content)
    return tuple(content)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Every module of `network` in evaluation mode; afterwards each in its own again."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _autocast(clip: ClipModel, precision: Precision) -> torch.autocast:
    kind = clip.device.type
    return torch.autocast(kind, dtype=DTYPES.get(precision, torch.bfloat16), enabled=precision != "no")


@torch.no_grad()
def image_features(clip: ClipModel, crops: Sequence[Image.Image], precision: Precision = "no") -> Tensor:
    """Unit vectors (B, D), fp32 on the CPU, of pictures that `clip.resize_crop` has made."""
    pixels = clip.normalise(crops).to(clip.device)
    with evaluation_mode(clip.network), _autocast(clip, precision):
        found = clip.network.encode_image(pixels, normalize=True)
    return nn.functional.normalize(found.float(), dim=-1).cpu()


@torch.no_grad()
def text_features(
    clip: ClipModel, texts: Sequence[str], precision: Precision = "no", batch_size: int = 256
) -> Tensor:
    """Unit vectors (B, D), fp32 on the CPU; equal texts are read once."""
    unique = list(dict.fromkeys(texts))
    parts = []
    with evaluation_mode(clip.network), _autocast(clip, precision):
        for start in range(0, len(unique), batch_size):
            ids = clip.tokenize(unique[start : start + batch_size]).to(clip.device)
            found = clip.network.encode_text(ids, normalize=True)
            parts.append(nn.functional.normalize(found.float(), dim=-1).cpu())
    places = {text: number for number, text in enumerate(unique)}
    return torch.cat(parts)[[places[text] for text in texts]]


def doubts(clip: ClipModel, classes: ClassPrompts) -> list[str]:
    """Sentences on how this model reads the prompts: at the wrong token, or not to their end."""
    texts = [prompts[0] for prompts in classes.prompts]
    found, elsewhere = [], pooled_elsewhere(clip, texts)
    if elsewhere:
        found.append(
            f"{clip.source!r} reads {len(elsewhere)} of {len(texts)} prompts at another token than their end "
            "(open_clip pools at the highest id unless text_cfg has pool_type eos and eos_id): its zero-shot numbers are "
            "those of one word"
        )
    if clip.cut_captions:
        found.append(f"{clip.source!r} read {clip.cut_captions} texts, longer than its context, without their end")
    return found


def class_vectors(clip: ClipModel, classes: ClassPrompts, precision: Precision = "no") -> Tensor:
    """One unit vector (C, D) for each class: the mean of its prompts' unit vectors (Radford et al. 2021, 3.1.4)."""
    vectors = text_features(clip, [text for prompts in classes.prompts for text in prompts], precision)
    means = torch.stack([part.mean(0) for part in vectors.split([len(prompts) for prompts in classes.prompts])])
    return nn.functional.normalize(means, dim=-1)
