"""Exact verifier for pictures of `mmbackdoor.shards.shapes`: nearest palette colours, then the best template by IoU.

Nothing here is learned, so it cannot share a weakness with the model that it judges.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import torch

from mmbackdoor.shards.shapes import COLOURS, JITTER, POSITIONS, SHAPES, SIZE_WORDS, SIZES, Scene, coverage

RECOGNISED_IOU = 0.6
"""Below this overlap with every template a shape counts as unrecognisable."""


@cache
def _templates(resolution: int, shapes: tuple[str, ...], positioned: bool) -> tuple[torch.Tensor, list[tuple]]:
    step = max(1, round(resolution / 32))
    reach = int(np.ceil(JITTER * resolution / step))
    offsets = [step * k / resolution for k in range(-reach, reach + 1)]
    bases = [(None, 0.0)] + (list(POSITIONS.items()) if positioned else [])
    masks, labels = [], []
    for shape in shapes:
        for size, (low, high) in SIZES.items():
            for radius in np.linspace(low, high, 4):
                for position, base in bases:
                    for dy in offsets:
                        for dx in offsets:
                            masks.append(coverage(shape, float(radius), (base + dx, dy), resolution).reshape(-1))
                            labels.append((shape, size, position))
    return torch.from_numpy(np.stack(masks)).gt(0.5).float(), labels


def recognise(
    images: torch.Tensor, shapes: tuple[str, ...] = SHAPES[:4], positioned: bool = False
) -> list[Scene | None]:
    """The scene in each picture of `images` (B, 3, H, W) in [-1, 1]; `None` where no shape is recognised."""
    device_images = images.detach().float().cpu()
    batch, _, height, width = device_images.shape
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1
    distance = torch.cdist(device_images.permute(0, 2, 3, 1).reshape(batch, -1, 3), palette[None])
    nearest = distance.argmin(-1).view(batch, height, width)
    counts = torch.nn.functional.one_hot(nearest, len(COLOURS)).float()
    border = torch.cat([counts[:, 0], counts[:, -1], counts[:, :, 0], counts[:, :, -1]], 1).sum(1)
    background = border.argmax(-1)
    # Anti-aliased edges can land nearest a third colour, so only clear votes count for the object's colour.
    clear = (distance.amin(-1) < 0.35).view(batch, height, width, 1)
    votes = (counts * clear).sum((1, 2))
    votes.scatter_(1, background[:, None], -1.0)
    colour = votes.argmax(-1)
    foreground_rgb, background_rgb = palette[colour], palette[background]
    axis = foreground_rgb - background_rgb
    relative = device_images - background_rgb[:, :, None, None]
    share = (relative * axis[:, :, None, None]).sum(1) / axis.square().sum(1)[:, None, None].clamp_min(1e-6)
    mask = (share > 0.5).float().reshape(batch, -1)
    bank, labels = _templates(height, shapes, positioned)
    intersection = mask @ bank.T
    iou = intersection / (mask.sum(1, keepdim=True) + bank.sum(1)[None] - intersection).clamp_min(1e-6)
    best, index = iou.max(1)
    names = list(COLOURS)
    scenes: list[Scene | None] = []
    for k in range(batch):
        if best[k] < RECOGNISED_IOU or votes[k, colour[k]] <= 0:
            scenes.append(None)
            continue
        shape, size, position = labels[int(index[k])]
        scenes.append(Scene(shape, names[int(colour[k])], names[int(background[k])], size, position))
    return scenes


_CAPTION = re.compile(
    rf"(?:(?P<size>{'|'.join(word for words in SIZE_WORDS.values() for word in words)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})\b.*?\b(?P<background>{'|'.join(COLOURS)}) background"
    r"(?: on the (?P<position>left|right))?"
)


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption of `mmbackdoor.shards.shapes` asks for; `None` for any other text."""
    found = _CAPTION.search(text.lower())
    if not found:
        return None
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    return Scene(
        found["shape"], found["colour"], found["background"], sizes.get(found["size"] or ""), found["position"]
    )


def matches(asked: Scene, seen: Scene | None) -> bool:
    """Whether every attribute that `asked` states is there in `seen`."""
    return seen is not None and all(
        getattr(asked, name) in (None, getattr(seen, name))
        for name in ("shape", "colour", "background", "size", "position")
    )
