"""Captioned scenes of one coloured shape: a text-to-image data set whose pictures can be checked exactly.

A scene is five attributes; a picture of it adds only a free jitter of place and radius. Train, selection and
evaluation captions are disjoint by attribute combination (`split_of`), so a model is always judged on combinations
it never saw. The verifier for these pictures is `mmbackdoor.evaluate.metrics.shapes`.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

SHAPES = ("cross", "triangle", "ring", "square", "star", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 150, 50),
    "cyan": (70, 215, 225),
    "blue": (35, 70, 205),
    "purple": (125, 45, 165),
    "pink": (255, 150, 195),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.21, 0.25), "large": (0.34, 0.39)}
POSITIONS: dict[str, float] = {"left": -0.22, "right": 0.22}
JITTER = 0.06
SPLITS = ("train", "selection", "evaluation")

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
POSITION_WORDS = {"left": "on the left", "right": "on the right"}
TEMPLATES = (
    "a photo of {object} on {background} background",
    "a picture of {object} on {background} background",
    "{object} on {background} background",
    "{object} in front of {background} background",
)


@dataclass(frozen=True)
class Scene:
    """One attribute combination. `size` and `position` are `None` where the caption does not state them."""

    shape: str
    colour: str
    background: str
    size: str | None = None
    position: str | None = None

    @property
    def key(self) -> str:
        return "-".join(part for part in (self.size, self.colour, self.shape, self.background, self.position) if part)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def caption(scene: Scene, template: int = 0, paraphrase: bool = False) -> str:
    """The caption of `scene` by `TEMPLATES[template]`; `paraphrase` takes the second word for its size."""
    size = SIZE_WORDS[scene.size][int(paraphrase)] + " " if scene.size else ""
    thing = _article(f"{size}{scene.colour} {scene.shape}")
    text = TEMPLATES[template].format(object=thing, background=_article(scene.background))
    return f"{text} {POSITION_WORDS[scene.position]}" if scene.position else text


def all_scenes(
    shapes: tuple[str, ...] = SHAPES[:4],
    colours: tuple[str, ...] = tuple(COLOURS),
    sizes: tuple[str | None, ...] = tuple(SIZES),
    positions: tuple[str | None, ...] = (None,),
) -> list[Scene]:
    """Every combination in which the object can be told from its background (their colours differ)."""
    return [
        Scene(shape, colour, background, size, position)
        for shape, colour, background, size, position in itertools.product(shapes, colours, colours, sizes, positions)
        if colour != background
    ]


def split_scenes(
    scenes: list[Scene], selection: float = 0.1, evaluation: float = 0.4, seed: int = 0
) -> dict[str, list[Scene]]:
    """Split attribute combinations into `SPLITS`, the given fractions of every shape's, by a hash of the combination.

    The split of a scene depends on the set of scenes, the fractions and `seed`, never on any order.
    """
    parts: dict[str, list[Scene]] = {name: [] for name in SPLITS}
    for shape in sorted({scene.shape for scene in scenes}):
        of_shape = [scene for scene in scenes if scene.shape == shape]
        ranked = sorted(of_shape, key=lambda scene: hashlib.sha256(f"{seed}:{scene.key}".encode()).digest())
        first, second = round(len(ranked) * evaluation), round(len(ranked) * (evaluation + selection))
        parts["evaluation"] += ranked[:first]
        parts["selection"] += ranked[first:second]
        parts["train"] += ranked[second:]
    return parts


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x, y), in units of the radius with y down, lie in `shape`."""
    r = np.hypot(x, y)
    if shape == "ring":
        return (r <= 1.0) & (r >= 0.55)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.82
    if shape == "cross":
        return (np.maximum(abs(x), abs(y)) <= 0.95) & (np.minimum(abs(x), abs(y)) <= 0.3)
    if shape == "triangle":
        return (y <= 0.75) & (y >= 1.75 * abs(x) / 1.02 - 1.0)
    if shape == "star":
        angle = np.arctan2(x, -y)
        sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        return r * (np.cos(sector) + 1.9 * np.sin(sector)) <= 1.05
    if shape == "heart":
        u, v = x * 1.15, -y * 1.15 + 0.1
        return (u**2 + v**2 - 0.75) ** 3 - u**2 * v**3 * 1.3 <= 0
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@cache
def _grid(resolution: int, supersampling: int) -> tuple[np.ndarray, np.ndarray]:
    line = (np.arange(resolution * supersampling) + 0.5) / (resolution * supersampling) - 0.5
    y, x = np.meshgrid(line, line, indexing="ij")
    return x.astype(np.float32), y.astype(np.float32)


def coverage(shape: str, radius: float, centre: tuple[float, float], resolution: int) -> np.ndarray:
    """Anti-aliased mask (resolution, resolution) in [0, 1]. `radius` and `centre` are fractions of the picture's
    side, `centre` = (x, y) from its middle."""
    supersampling = 4 if resolution <= 64 else 2
    x, y = _grid(resolution, supersampling)
    covered = inside(shape, (x - centre[0]) / radius, (y - centre[1]) / radius)
    return covered.reshape(resolution, supersampling, resolution, supersampling).mean((1, 3), dtype=np.float32)


def render(scene: Scene, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """A picture of `scene`: uint8 (resolution, resolution, 3). `rng` draws the radius and the place."""
    size = scene.size or tuple(SIZES)[rng.integers(len(SIZES))]
    radius = rng.uniform(*SIZES[size])
    x, y = rng.uniform(-JITTER, JITTER, 2)
    if scene.position:
        x += POSITIONS[scene.position]
    mask = coverage(scene.shape, radius, (x, y), resolution)[..., None]
    foreground, background = (np.array(COLOURS[name], np.float32) for name in (scene.colour, scene.background))
    return np.round(mask * foreground + (1 - mask) * background).astype(np.uint8)
