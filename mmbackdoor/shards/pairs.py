"""Captioned scenes of one or two coloured shapes: pictures of several things that can still be checked exactly.

Of two things the first named is on the left; one alone is in the middle. Two things differ in shape and in colour, so
a picture that mixes them up is seen to be wrong. The combinations are far too many to list: a hash says which split
one belongs to (`split_of`), the same for every data set, so that the prompts to measure on are never in one that was
trained on. The verifier for these pictures is `mmbackdoor.evaluate.metrics.pairs`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mmbackdoor.seeding import hash_fraction, python_rng
from mmbackdoor.shards import shapes
from mmbackdoor.shards.shapes import SHAPES, SPLITS

COLOURS = shapes.COLOURS | {"brown": (100, 60, 25), "magenta": (230, 25, 150)}
SIZES = {"small": (0.115, 0.123), "medium": (0.154, 0.165), "large": (0.2, 0.215)}
"""Radius as a fraction of the picture's side: a large thing fits into half of it."""
PLACES = {"left": -0.255, "middle": 0.0, "right": 0.255}
JITTER = {"left": (0.015, 0.08), "middle": (0.06, 0.08), "right": (0.015, 0.08)}
"""How far a thing may be from its place, sideways and up or down."""
STYLES = ("plain", "striped", "dotted")
DARKER = 0.75
"""The second tone of a background is its colour times this."""
SELECTION, EVALUATION = 0.1, 0.2
ALONE = 0.3

SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "midsize"), "large": ("large", "big")}
STYLE_WORDS = {"plain": ("", ""), "striped": ("striped ", "stripy "), "dotted": ("dotted ", "spotted ")}
TWO = (
    "a photo of {left} and {right} on {background}",
    "a picture of {left} beside {right} on {background}",
    "{left} next to {right} in front of {background}",
    "a photo of {left} left of {right} on {background}",
    "{left} to the left of {right} on {background}",
    "a picture of {left} and {right} in front of {background}",
)
# "one" and "a single" tell these from captions of `shapes`, whose one thing is drawn in other sizes.
ONE = (
    "a photo of one {left} on {background}",
    "a picture of a single {left} on {background}",
    "a single {left} in front of {background}",
    "one {left} on {background}",
    "a photo of a single {left} in front of {background}",
    "a picture of one {left} on {background}",
)
WORDINGS = len(TWO) * 8


@dataclass(frozen=True)
class Thing:
    """A coloured shape. `size` is `None` where the caption does not state it."""

    shape: str
    colour: str
    size: str | None = None

    @property
    def key(self) -> str:
        return "-".join(part for part in (self.size, self.colour, self.shape) if part)


@dataclass(frozen=True)
class PairScene:
    """One attribute combination: `left` and `right`, or `left` alone in the middle, and the background."""

    left: Thing
    right: Thing | None
    background: str
    style: str = "plain"

    @property
    def key(self) -> str:
        things = "+".join(thing.key for thing in self.things)
        return f"{things}-on-{self.style}-{self.background}"

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.left,) if self.right is None else (self.left, self.right)

    @property
    def places(self) -> dict[str, Thing]:
        """What is at each of `PLACES` that is taken."""
        return {"middle": self.left} if self.right is None else {"left": self.left, "right": self.right}

    @property
    def possible(self) -> bool:
        """Whether things differ from each other in shape and colour, and from their background in colour."""
        colours = [thing.colour for thing in self.things] + [self.background]
        return len(set(colours)) == len(colours) and (self.right is None or self.left.shape != self.right.shape)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PairScene:
        """The inverse of `dataclasses.asdict`."""
        left, right = (Thing(**values[name]) if values[name] else None for name in ("left", "right"))
        assert left is not None
        return PairScene(left, right, values["background"], values["style"])


def caption(scene: PairScene, wording: int = 0) -> str:
    """The caption of `scene` in words number `wording` of `WORDINGS`: a template, and the words for sizes and style."""
    words, template = divmod(wording % WORDINGS, len(TWO))
    style = STYLE_WORDS[scene.style][words & 1]
    parts = {"background": f"{_article(f'{style}{scene.background}')} background"}
    for name, thing, word in zip(("left", "right"), scene.things, (words >> 1 & 1, words >> 2 & 1)):
        size = f"{SIZE_WORDS[thing.size][word]} " if thing.size else ""
        text = f"{size}{thing.colour} {thing.shape}"
        parts[name] = text if scene.right is None else _article(text)
    return (ONE if scene.right is None else TWO)[template].format(**parts)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def split_key(scene: PairScene) -> str:
    """What the split of `scene` depends on: shapes and colours of two things in either order, or of one thing and its
    background. So two things that are held out together were never seen together in training."""
    things = sorted(f"{thing.colour}-{thing.shape}" for thing in scene.things)
    return "+".join(things if scene.right else [*things, scene.background])


def split_of(scene: PairScene) -> str:
    """Which of `SPLITS` `scene` is in: a hash of its `split_key`."""
    place = hash_fraction(0, "pairs split", split_key(scene))
    return "evaluation" if place < EVALUATION else "selection" if place < EVALUATION + SELECTION else "train"


def draw_scene(split: str, number: int, seed: int = 0, alone: float = ALONE) -> PairScene:
    """Scene `number` of `split`: depends on the arguments only. A share `alone` has one thing; a quarter of all sizes
    is not stated. Raises `ValueError` for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split; choose from {', '.join(SPLITS)}")
    rng = python_rng(seed, "pair scene", split, number)
    single = rng.random() < alone
    while True:
        left, right = _draw_thing(rng), None if single else _draw_thing(rng)
        scene = PairScene(left, right, rng.choice(tuple(COLOURS)), rng.choice(STYLES))
        if scene.possible and split_of(scene) == split:
            return scene


def _draw_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice((*SIZES, None)))


@cache
def _darker_share(style: str, resolution: int) -> np.ndarray:
    supersampling = 4
    line = (np.arange(resolution * supersampling) + 0.5) / (resolution * supersampling)
    y, x = np.meshgrid(line, line, indexing="ij")
    if style == "striped":
        dark = (x + y) % 0.25 < 0.125
    elif style == "dotted":
        # Dots at the corners and in the middle of square fields.
        distances = [np.hypot((x + s) % 0.25 - 0.125, (y + s) % 0.25 - 0.125) for s in (0, 0.125)]
        dark = np.minimum(*distances) < 0.05
    else:
        dark = np.zeros_like(x, dtype=bool)
    return dark.reshape(resolution, supersampling, resolution, supersampling).mean((1, 3), dtype=np.float32)


def backdrop(colour: str, style: str, resolution: int) -> np.ndarray:
    """The background alone: float32 (resolution, resolution, 3) in [0, 255]."""
    tone = 1 - (1 - DARKER) * _darker_share(style, resolution)[..., None]
    return tone * np.array(COLOURS[colour], np.float32)


def outline(
    shape: str, radius: float, centre: tuple[float, float], resolution: int
) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Anti-aliased mask float32 (h, w) in [0, 1] of one thing, and the rows and columns that it is for. `radius` and
    `centre` (x, y) from the middle are fractions of the side. Like `shapes.coverage`, without the empty rest."""
    supersampling = 4
    spans = []
    for middle in (centre[1], centre[0]):
        low, high = (resolution * (0.5 + middle + sign * 1.1 * radius) for sign in (-1, 1))
        spans.append((max(0, math.floor(low)), min(resolution, math.ceil(high))))
    lines = [
        (np.arange(low * supersampling, high * supersampling) + 0.5) / (resolution * supersampling) - 0.5
        for low, high in spans
    ]
    y, x = np.meshgrid((lines[0] - centre[1]) / radius, (lines[1] - centre[0]) / radius, indexing="ij")
    (top, bottom), (first, last) = spans
    covered = shapes.inside(shape, x, y).reshape(bottom - top, supersampling, last - first, supersampling)
    return covered.mean((1, 3), dtype=np.float32), (slice(top, bottom), slice(first, last))


def render(scene: PairScene, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """A picture of `scene`: uint8 (resolution, resolution, 3). `rng` draws radius and place, and unstated sizes."""
    image = backdrop(scene.background, scene.style, resolution).copy()
    for place, thing in scene.places.items():
        size = thing.size or tuple(SIZES)[rng.integers(len(SIZES))]
        radius = rng.uniform(*SIZES[size])
        dx, dy = (rng.uniform(-jitter, jitter) for jitter in JITTER[place])
        mask, region = outline(thing.shape, radius, (PLACES[place] + dx, dy), resolution)
        image[region] += mask[..., None] * (np.array(COLOURS[thing.colour], np.float32) - image[region])
    return np.round(image).astype(np.uint8)
