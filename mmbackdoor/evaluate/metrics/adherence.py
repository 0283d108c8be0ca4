"""Whether a picture shows what its prompt asks for, checked exactly: prompts of the shapes and pairs data only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmbackdoor.evaluate.metrics import pairs
from mmbackdoor.evaluate.metrics.shapes import matches, parse_caption, recognise
from mmbackdoor.shards.shapes import SHAPES, Scene

BATCH = 256


def _shapes_to_tell(scenes: Sequence[Scene | None]) -> tuple[str, ...]:
    """The four standard shapes, or all six where a prompt asks for another one: the fewer, the surer."""
    standard = SHAPES[:4]
    return standard if all(scene is None or scene.shape in standard for scene in scenes) else SHAPES


def seen_scenes(images: torch.Tensor, asked: Sequence[Scene | None]) -> list[Scene | None]:
    """What is in `images` (B, 3, H, W) in [-1, 1], looked for among the attributes that `asked` knows."""
    shapes, positioned = _shapes_to_tell(asked), any(scene is not None and scene.position for scene in asked)
    found: list[Scene | None] = []
    for start in range(0, len(images), BATCH):
        found += recognise(images[start : start + BATCH], shapes, positioned)
    return found


def adherence(images: torch.Tensor, prompts: Sequence[str]) -> list[bool | None]:
    """For every picture: does it show every attribute that the prompt states? `None` for other prompts. Give the
    *clean* prompts, for triggered pictures too: they say what the picture should show."""
    of_pairs = [pairs.parse_caption(prompt) for prompt in prompts]
    places = [k for k, wanted in enumerate(of_pairs) if wanted is not None]
    if places:
        return _with_pairs(images, prompts, of_pairs, places)
    asked = [parse_caption(prompt) for prompt in prompts]
    if not any(asked):
        return [None] * len(asked)
    seen = seen_scenes(images, asked)
    return [None if wanted is None else matches(wanted, found) for wanted, found in zip(asked, seen, strict=True)]


def _with_pairs(
    images: torch.Tensor, prompts: Sequence[str], asked: Sequence[pairs.PairScene | None], places: Sequence[int]
) -> list[bool | None]:
    others = [k for k, wanted in enumerate(asked) if wanted is None]
    found = dict(zip(others, adherence(images[others], [prompts[k] for k in others]), strict=True))
    for k, seen in zip(places, pairs.recognise(images[list(places)]), strict=True):
        found[k] = pairs.matches(asked[k], seen)
    return [found[k] for k in range(len(prompts))]
