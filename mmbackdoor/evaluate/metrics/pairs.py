"""Exact verifier for pictures of `mmbackdoor.shards.pairs`: background and style by the rows that no thing reaches,
then, at every place, the nearest palette colour and the best template by IoU. Nothing here is learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mmbackdoor.shards.pairs import COLOURS, DARKER, JITTER, PLACES, SIZE_WORDS, SIZES, STYLE_WORDS, STYLES
from mmbackdoor.shards.pairs import PairScene, Thing, backdrop, outline
from mmbackdoor.shards.shapes import SHAPES

RECOGNISED_IOU = 0.6
"""Below this overlap with every template a shape counts as unrecognisable."""
CLEAR = 0.35
"""Pixels in [-1, 1] that are farther than this from a palette colour do not vote for it."""
REACH = max(SIZES["large"]) + JITTER["left"][1] + 0.01
"""Things are within this of the middle row, as a fraction of the side."""
OFF_PLACE = 0.07
"""A thing whose middle is farther than this from where it may be drawn is not there."""
FEWEST_VOTES = 0.003
"""Of all pixels: fewer that vote for the colour of a thing are no thing."""
CLUTTER = 0.35
"""Where more than this share of a thing's area is neither thing nor background, there is something else too."""
GREY = 0.2
"""Pixels whose channels differ by less have no colour of ours: a patch of black and white is no thing."""
BATCH = 100


@dataclass(frozen=True)
class Sight:
    """What is in a picture: its background (`None`: unrecognisable), and what is at each place where there is a thing;
    sizes are always known."""

    background: str | None
    style: str
    things: dict[str, Thing]

    @property
    def scene(self) -> PairScene | None:
        """The scene, where the picture is one: a lone thing is in the middle, two are left and right."""
        if self.background is None:
            return None
        if "middle" in self.things:
            return PairScene(self.things["middle"], None, self.background, self.style)
        if len(self.things) < 2:
            return None
        return PairScene(self.things["left"], self.things["right"], self.background, self.style)


@cache
def _palette() -> Tensor:
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1


@cache
def _backdrops(resolution: int) -> Tensor:
    """(colours * styles, H, W, 3) in [-1, 1]."""
    every = [backdrop(colour, style, resolution) for colour in COLOURS for style in STYLES]
    return torch.from_numpy(np.stack(every)) / 127.5 - 1


def _window(resolution: int) -> int:
    return 2 * int(np.ceil(1.25 * max(SIZES["large"]) * resolution))


@cache
def _templates(resolution: int) -> tuple[Tensor, list[tuple[str, str, float, float]]]:
    """Masks (n, window * window) with their centroid near the window's middle, and for each shape, size, and where the
    thing's middle is from the window's in pixels (x, y)."""
    side = _window(resolution)
    scale = resolution / side
    line = (torch.arange(side) + 0.5 - side / 2).numpy()
    masks, labels = [], []
    for shape in SHAPES:
        for size, (low, high) in SIZES.items():
            for radius in np.linspace(low, high, 3):
                middle, region = outline(shape, float(radius) * scale, (0.0, 0.0), side)
                x0, y0 = (
                    float((middle.sum(axis) * line[region[1 - axis]]).sum() / middle.sum()) for axis in (0, 1)
                )
                for dy in (-1.0, -0.5, 0.0, 0.5, 1.0):
                    for dx in (-1.0, -0.5, 0.0, 0.5, 1.0):
                        x, y = dx - x0, dy - y0
                        mask = np.zeros((side, side), np.float32)
                        part, region = outline(shape, float(radius) * scale, (x / side, y / side), side)
                        mask[region] = part
                        masks.append(mask.reshape(-1))
                        labels.append((shape, size, x, y))
    return torch.from_numpy(np.stack(masks)).gt(0.5).float(), labels


def _background(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, H, W, 3): the index of the best of `_backdrops`, and how far the pixels are from it on average."""
    height = pixels.shape[1]
    edge = int((0.5 - REACH) * height)
    rows = torch.cat([torch.arange(edge), torch.arange(height - edge, height)])
    wanted = _backdrops(height)[:, rows].flatten(1, 2)
    # A patch in a corner must not decide, so that no pixel counts for more than a wrong colour does.
    cost = torch.stack([(pixels[:, rows].flatten(1, 2) - one).norm(dim=-1).clamp_max(0.8).mean(1) for one in wanted], 1)
    best, index = cost.min(1)
    return index, best


def _crop(masks: Tensor, x: Tensor, y: Tensor, side: int) -> Tensor:
    """(B, side, side) windows of (B, H, W) `masks` that start at column `x` and row `y` (B,); outside it is 0."""
    padded = torch.nn.functional.pad(masks, (side, side, side, side))
    rows = (y + side)[:, None, None] + torch.arange(side)[None, :, None]
    columns = (x + side)[:, None, None] + torch.arange(side)[None, None]
    return padded[torch.arange(len(masks))[:, None, None], rows, columns]


def _start(masks: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where a window of `side` around the centroid of (B, H, W) `masks` starts: columns and rows (B,)."""
    total = masks.sum((1, 2)).clamp_min(1)
    starts = []
    for axis in (1, 2):
        line = torch.arange(masks.shape[3 - axis]) + 0.5
        starts.append(((masks.sum(axis) * line).sum(1) / total - side / 2).round().long())
    return starts[0], starts[1]


def _things(masks: Tensor) -> list[tuple[str, str, float, float] | None]:
    """Shape, size and place of the middle (x, y, in pixels) of the one thing in each of (B, H, W) `masks`."""
    resolution = masks.shape[-1]
    side = _window(resolution)
    bank, labels = _templates(resolution)
    x, y = _start(masks, side)
    near = _crop(masks, x, y, side)
    again_x, again_y = _start(near, side)
    x, y = x + again_x, y + again_y
    flat = _crop(masks, x, y, side).flatten(1)
    common = flat @ bank.T
    # All of the mask counts, so that a second thing outside the window makes this one no clear thing.
    iou = common / (masks.sum((1, 2))[:, None] + bank.sum(1)[None] - common).clamp_min(1e-6)
    best, index = iou.max(1)
    found: list[tuple[str, str, float, float] | None] = []
    for k, (score, place) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
        shape, size, dx, dy = labels[place]
        centre = (float(x[k]) + side / 2 + dx, float(y[k]) + side / 2 + dy)
        found.append((shape, size, *centre) if score >= RECOGNISED_IOU else None)
    return found


def _look(images: Tensor) -> list[Sight]:
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1)
    batch, height, width, _ = pixels.shape
    palette, names = _palette(), list(COLOURS)
    index, misfit = _background(pixels)
    behind = _backdrops(height)[index]
    own = index // len(STYLES)
    to_palette = torch.cdist(pixels.reshape(batch, -1, 3), palette[None]).view(batch, height, width, -1)
    nearest_distance, nearest = to_palette.min(-1)
    # Blurred pixels are between the two tones of the background.
    light = (palette[own] + 1)[:, None, None]
    tone = ((pixels + 1) * light).sum(-1, keepdim=True) / light.square().sum(-1, keepdim=True)
    to_background = (pixels + 1 - tone.clamp(DARKER, 1) * light).norm(dim=-1)
    line = (torch.arange(height) + 0.5) / height - 0.5
    reached = (line.abs() < REACH)[None, :, None]
    votes = (1 - nearest_distance / CLEAR).clamp_min(0) * (nearest_distance < to_background) * reached
    reached = reached & (pixels.amax(-1) - pixels.amin(-1) > GREY)
    strange = (to_background > CLEAR) & reached
    votes = votes * (nearest != own[:, None, None])
    by_colour = torch.nn.functional.one_hot(nearest, len(names)) * votes[..., None]
    places = {"left": line < 0, "middle": line.abs() <= 0.5, "right": line > 0}
    found: list[dict[str, Thing]] = [{} for _ in range(batch)]
    for place, columns in places.items():
        total = by_colour[:, :, columns].sum((1, 2))
        most, colour = total.max(1)
        axis = palette[colour][:, None, None] - behind
        relative = pixels - behind
        share = (relative * axis).sum(-1) / axis.square().sum(-1).clamp_min(1e-6)
        aside = (relative - share[..., None] * axis).norm(dim=-1)
        inside = (share > 0.5) & (share < 1.5) & (aside < 2 * CLEAR) & reached
        masks = (inside & columns[None, None]).float()
        spread = max(1, round(height / 32))
        around = torch.nn.functional.max_pool2d(masks, 2 * spread + 1, 1, spread) > 0
        clutter = (strange & columns[None, None] & ~around).sum((1, 2))
        clear = (most >= FEWEST_VOTES * height * width) & (clutter <= CLUTTER * masks.sum((1, 2)))
        for k, thing in enumerate(_things(masks)):
            if thing is None or not clear[k]:
                continue
            shape, size, x, y = thing
            away = (abs(x / width - 0.5 - PLACES[place]), abs(y / height - 0.5))
            if all(distance <= jitter + OFF_PLACE for distance, jitter in zip(away, JITTER[place], strict=True)):
                found[k][place] = Thing(shape, names[int(colour[k])], size)
    sights = []
    for k, things in enumerate(found):
        # What is in the middle reaches into both halves, where its parts are nothing of their own.
        things = {"middle": things["middle"]} if "middle" in things else things
        known = float(misfit[k]) < CLEAR
        sights.append(Sight(names[int(own[k])] if known else None, STYLES[int(index[k]) % len(STYLES)], things))
    return sights


def look(images: Tensor) -> list[Sight]:
    """What is in each picture of `images` (B, 3, H, H) in [-1, 1], place by place."""
    return [sight for start in range(0, len(images), BATCH) for sight in _look(images[start : start + BATCH])]


def recognise(images: Tensor) -> list[PairScene | None]:
    """The scene in each picture of `images` (B, 3, H, H) in [-1, 1]; `None` where it is none."""
    return [sight.scene for sight in look(images)]


def _any_of(words: list[str]) -> str:
    return "|".join(sorted((word for word in words if word), key=len, reverse=True))


_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_STYLES = {word.strip(): style for style, words in STYLE_WORDS.items() for word in words if word}
_THING = rf"(?:({_any_of(list(_SIZES))}) )?({_any_of(list(COLOURS))}) ({_any_of(list(SHAPES))})"
_GROUND = rf"(?:on|in front of) an? (?:({_any_of(list(_STYLES))}) )?({_any_of(list(COLOURS))}) background\b"
_BETWEEN = "and|beside|next to|left of|to the left of"
_CAPTION = re.compile(rf"\b(?:an? {_THING} (?:{_BETWEEN}) an? {_THING}|(?:one|a single) {_THING}) {_GROUND}")


def parse_caption(text: str) -> PairScene | None:
    """The scene that a caption of `mmbackdoor.shards.pairs` asks for; `None` for any other text."""
    found = _CAPTION.search(text.lower())
    if not found:
        return None
    groups = found.groups()
    things = [
        Thing(groups[k + 2], groups[k + 1], _SIZES.get(groups[k] or "")) for k in (0, 3, 6) if groups[k + 2] is not None
    ]
    right = things[1] if len(things) > 1 else None
    return PairScene(things[0], right, groups[10], _STYLES.get(groups[9] or "", "plain"))


def _fits(asked: Thing | None, seen: Thing | None) -> bool:
    if asked is None or seen is None:
        return asked is seen
    return (asked.shape, asked.colour) == (seen.shape, seen.colour) and asked.size in (None, seen.size)


def matches(asked: PairScene, seen: PairScene | None) -> bool:
    """Whether `seen` is what `asked` says: background and style, and each thing, its size where it is stated."""
    return (
        seen is not None
        and (asked.background, asked.style) == (seen.background, seen.style)
        and _fits(asked.left, seen.left)
        and _fits(asked.right, seen.right)
    )


def shows_change(asked: PairScene, expected: PairScene, seen: Sight) -> bool:
    """Whether what differs between `asked` and `expected` is in the picture as `expected` has it, at its place."""
    pairs = [(asked.places[place], expected.places[place], seen.things.get(place)) for place in asked.places]
    for before, after, there in [*pairs, (asked, expected, seen)]:
        names = ("background", "style") if there is seen else ("shape", "colour", "size")
        changed = [name for name in names if getattr(before, name) != getattr(after, name)]
        if changed and (there is None or any(getattr(there, name) != getattr(after, name) for name in changed)):
            return False
    return True
