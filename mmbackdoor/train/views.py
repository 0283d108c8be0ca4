"""Augmented views of a pair: pure functions of (key, epoch, seed), made when the sample is read, never cached.

Pictures: AutoAugment's ImageNet policy, or a stronger one of ours. Captions: one of four small edits (EDA).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Literal

import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import AutoAugment

from mmbackdoor.seeding import python_rng

Strength = Literal["auto", "strong"]
SMALLEST_CROP = 0.5
COLOUR = 0.4
CUTOUT = (0.2, 0.5)
ALPHA = 0.1
"""Share of the words that an edit of a caption changes; at least one."""


def image_view(
    image: Image.Image, key: str, epoch: int, seed: int, draw: int = 0, strength: Strength = "auto"
) -> Image.Image:
    """An augmented RGB picture of the same size, the same one for the same (key, epoch, seed, draw).

    `auto` is one of the 25 pairs of operations of AutoAugment (Cubuk et al. 2019, arXiv 1805.09501, table 9), as
    torchvision applies them and CleanCLIP uses them. `strong` is a flip, a crop of half to all of the area, brightness,
    contrast and saturation, and a cut-out rectangle of any grey; hue stays, since captions name colours.
    """
    rng = python_rng(seed, "image view", key, epoch, draw)
    return _strong(image, rng) if strength == "strong" else _Policy(rng)(image)


class _Policy(AutoAugment):
    """torchvision's, with its three draws from `rng` instead of torch's global generator."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def get_params(self, transform_num: int) -> tuple[int, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        rng = self.rng
        chances = torch.tensor([rng.random(), rng.random()])
        signs = torch.tensor([rng.randrange(2), rng.randrange(2)])
        return rng.randrange(transform_num), chances, signs


def _strong(image: Image.Image, rng: random.Random) -> Image.Image:
    width, height = image.size
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    area = rng.uniform(SMALLEST_CROP, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    across, down = min(1.0, math.sqrt(area * ratio)) * width, min(1.0, math.sqrt(area / ratio)) * height
    left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
    image = image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))
    for enhance in rng.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
        image = enhance(image).enhance(rng.uniform(1 - COLOUR, 1 + COLOUR))
    across, down = (max(1, round(rng.uniform(*CUTOUT) * side)) for side in image.size)
    left, top = rng.randint(0, width - across), rng.randint(0, height - down)
    image.paste((rng.randrange(256),) * 3, (left, top, left + across, top + down))
    return image


def text_view(text: str, key: str, epoch: int, seed: int) -> str:
    """`text` after one of four edits, the same one for the same (key, epoch, seed): synonyms for some words, synonyms
    put in, words swapped, words left out (Wei and Zou 2019, arXiv 1901.11196; a share `ALPHA` of the words, as in
    CleanCLIP). Never empty, unless `text` is.

    Differences: synonyms are those of a short list of our own, not WordNet's; where no word has one, a word of the
    caption itself is taken.
    """
    words = text.split()
    if not words:
        return text
    rng = python_rng(seed, "text view", key, epoch)
    edit = rng.choice(_EDITS)
    return " ".join(edit(words, max(1, int(ALPHA * len(words))), rng))


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """For each word of `synonyms.txt` the others of its line."""
    lines = (resources.files("mmbackdoor.train") / "data" / "synonyms.txt").read_text("utf-8").splitlines()
    groups = [line.split() for line in lines if line and not line.startswith("#")]
    return {word: tuple(other for other in group if other != word) for group in groups for word in group}


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _other(word: str, words: list[str], rng: random.Random) -> str:
    """A synonym of `word`, with what stands around it; without any, a word of `words`."""
    bare = _bare(word)
    if bare in synonyms():
        found = rng.choice(synonyms()[bare])
        start = word.lower().index(bare)
        return word[:start] + found + word[start + len(bare) :]
    return rng.choice(words)


def _replace(words: list[str], count: int, rng: random.Random) -> list[str]:
    known = [place for place, word in enumerate(words) if _bare(word) in synonyms()]
    places = known or range(len(words))
    new = list(words)
    for place in rng.sample(places, min(count, len(places))):
        new[place] = _other(words[place], words, rng)
    return new


def _insert(words: list[str], count: int, rng: random.Random) -> list[str]:
    known = [word for word in words if _bare(word) in synonyms()]
    new = list(words)
    for _ in range(count):
        new.insert(rng.randint(0, len(new)), _other(rng.choice(known or words), words, rng))
    return new


def _swap(words: list[str], count: int, rng: random.Random) -> list[str]:
    new = list(words)
    for _ in range(count if len(new) > 1 else 0):
        first, second = rng.sample(range(len(new)), 2)
        new[first], new[second] = new[second], new[first]
    return new


def _delete(words: list[str], count: int, rng: random.Random) -> list[str]:
    kept = [word for word in words if rng.random() >= ALPHA]
    return kept or [rng.choice(words)]


_EDITS: tuple[Callable[[list[str], int, random.Random], list[str]], ...] = (_replace, _insert, _swap, _delete)
