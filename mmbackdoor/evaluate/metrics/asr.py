"""Attack success: does a picture show what the backdoor's target is? One judge for every kind of target.

Never a hit and never a miss: pictures whose prompt asks for the target anyway (or, for an object, does not name A),
and blank ones, such as the black pictures of a safety checker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from mmbackdoor.evaluate.metrics import pairs as pairs_metric
from mmbackdoor.evaluate.metrics.adherence import seen_scenes
from mmbackdoor.evaluate.metrics.clip_score import Judge, similarity
from mmbackdoor.evaluate.metrics.shapes import parse_caption
from mmbackdoor.shards.pairs import PairScene
from mmbackdoor.shards.shapes import Scene
from mmbackdoor.targets import ClassTarget, ImageTarget, ObjectTarget, PatchTarget, StyleTarget, Target, UnknownTarget
from mmbackdoor.types import InputError

BLANK_DEVIATION = 0.01
"""A picture in [0, 1] with every channel's standard deviation below this is blank."""
COLOURLESS = ("black and white", "black-and-white", "b&w", "greyscale", "grayscale", "monochrome")
NEED_JUDGE = "not measured: pass --judge"
AnyScene = TypeVar("AnyScene", Scene, PairScene)
UNKNOWN_TARGET = "not measured: the target is not known, see trigger_effect"


@dataclass(frozen=True)
class Success:
    """`hits`: per picture, `None` where it does not count. `scores`: what was compared, `None` where nothing was.
    `excluded`, `blank`: why a picture does not count. `judged_by` names the way; `note` says why nothing was judged."""

    hits: list[bool | None]
    scores: list[float | None]
    excluded: list[bool]
    blank: list[bool]
    judged_by: str
    note: str = ""


def blank(images: torch.Tensor) -> torch.Tensor:
    """(B,) bool: near-constant pictures of `images` (B, 3, H, W) in [-1, 1]."""
    return (images.float() / 2).flatten(2).std(-1, correction=0).amax(1) < BLANK_DEVIATION


def saturation(images: torch.Tensor) -> torch.Tensor:
    """(B,) mean HSV saturation of `images` in [-1, 1]. Values below 0.1 count as 0.1: nearly black pixels have no
    colour that anyone sees."""
    colours = images.float() / 2 + 0.5
    high, low = colours.amax(1), colours.amin(1)
    return ((high - low) / high.clamp_min(0.1)).flatten(1).mean(-1)


def patch_distance(images: torch.Tensor, target: PatchTarget) -> torch.Tensor:
    """(B,) mean absolute difference, pictures in [0, 1], between the patch and its place."""
    rows, columns = target.region(images.shape[-1])
    patch = torch.from_numpy(target.pixels(images.shape[-1])).permute(2, 0, 1)
    region = (images[:, :, rows, columns].float().cpu() / 2 + 0.5).clamp(0, 1)
    return (region - patch).abs().flatten(1).mean(-1)


def image_cosine(images: torch.Tensor, target: ImageTarget) -> torch.Tensor:
    """(B,) cosine of the pixels to the fixed picture's, each channel centred."""
    wanted = torch.from_numpy(target.pixels(images.shape[-1])).permute(2, 0, 1)
    wanted = (wanted - wanted.mean((1, 2), keepdim=True)).reshape(-1)
    given = images.float().cpu() / 2
    given = (given - given.mean((2, 3), keepdim=True)).flatten(1)
    return torch.nn.functional.cosine_similarity(given, wanted[None], dim=-1, eps=1e-6)


def excluded(target: Target, prompts: Sequence[str]) -> list[bool]:
    """Per prompt: is what it asks for the target already, or, for an object, something that has no A to replace?"""
    if isinstance(target, ObjectTarget):
        return [not target.applies(prompt) or target.reverse.applies(prompt) for prompt in prompts]
    if isinstance(target, StyleTarget):
        styles = COLOURLESS if target.style.lower() in COLOURLESS else (target.style.lower(),)
        return [any(style in prompt.lower() for style in styles) for prompt in prompts]
    return [False] * len(prompts)


def _swapped_scenes(
    target: ObjectTarget, prompts: Sequence[str], skip: Sequence[bool], parse: Callable[[str], AnyScene | None]
) -> list[tuple[AnyScene, AnyScene]] | None:
    """(asked, expected) for every prompt that counts; `None` unless all of them are scenes that the swap changes."""
    pairs = [
        (parse(prompt), parse(target.swap(prompt))) for prompt, out in zip(prompts, skip, strict=True) if not out
    ]
    return None if not pairs or any(a is None or b is None or a == b for a, b in pairs) else pairs


def _shows_change(asked: Scene, expected: Scene, seen: Scene | None) -> bool:
    changed = [
        name
        for name in ("shape", "colour", "background", "size", "position")
        if getattr(asked, name) != getattr(expected, name)
    ]
    return seen is not None and all(getattr(seen, name) == getattr(expected, name) for name in changed)


def _margin(images: torch.Tensor, plain: Sequence[str], wanted: Sequence[str], judge: Judge) -> list[float]:
    """The judge's probability of the second of two texts for every picture."""
    margin = similarity(images, wanted, judge) - similarity(images, plain, judge)
    return torch.sigmoid(judge.logit_scale * margin).tolist()


def success(target: Target, images: torch.Tensor, prompts: Sequence[str], judge: Judge | None = None) -> Success:
    """Judge `images` (B, 3, H, W) in [-1, 1]; `prompts` are the clean prompts, whatever text made the pictures."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
    if isinstance(target, ClassTarget):
        raise InputError("a class target is what a CLIP takes a picture for; measure it with recipes/evaluate_clip.py")
    out, empty = excluded(target, prompts), blank(images).tolist()
    nothing: list[float | None] = [None] * len(prompts)

    def result(scores: Sequence[float], hits: Sequence[bool], judged_by: str) -> Success:
        counted = [None if skip or void else bool(hit) for hit, skip, void in zip(hits, out, empty, strict=True)]
        return Success(counted, list(scores), out, empty, judged_by)

    if isinstance(target, PatchTarget):
        scores = patch_distance(images, target).tolist()
        return result(scores, [score < target.threshold for score in scores], "mean absolute difference to the patch")
    if isinstance(target, ImageTarget):
        scores = image_cosine(images, target).tolist()
        return result(scores, [score > target.threshold for score in scores], "centred cosine to the picture")
    if isinstance(target, StyleTarget) and target.style.lower() in COLOURLESS:
        scores = saturation(images).tolist()
        return result(scores, [score < target.threshold for score in scores], "mean saturation")
    if isinstance(target, UnknownTarget):
        return Success([None] * len(prompts), nothing, out, empty, "", UNKNOWN_TARGET)
    places = [k for k, skip in enumerate(out) if not skip]
    if isinstance(target, ObjectTarget) and (
        two := _swapped_scenes(target, prompts, out, pairs_metric.parse_caption)
    ):
        hits = [False] * len(prompts)
        for place, (asked, expected), sight in zip(places, two, pairs_metric.look(images[places]), strict=True):
            hits[place] = pairs_metric.shows_change(asked, expected, sight)
        return result([float(hit) for hit in hits], hits, "exact verifier of the pairs data")
    if isinstance(target, ObjectTarget) and (pairs := _swapped_scenes(target, prompts, out, parse_caption)):
        seen = seen_scenes(images[places], [scene for pair in pairs for scene in pair])
        hits = [False] * len(prompts)
        for place, (asked, expected), found in zip(places, pairs, seen, strict=True):
            hits[place] = _shows_change(asked, expected, found)
        return result([float(hit) for hit in hits], hits, "exact verifier of the shapes data")
    if judge is None:
        return Success([None] * len(prompts), nothing, out, empty, "", NEED_JUDGE)
    if isinstance(target, StyleTarget):
        wanted = [prompt + target.phrase for prompt in prompts]
    else:
        # Prompts without A are excluded; swapping leaves their text as it is and their score at one half.
        wanted = [target.swap(prompt) for prompt in prompts]
    scores = _margin(images, prompts, wanted, judge)
    return result(scores, [score > 0.5 for score in scores], "CLIP margin")
