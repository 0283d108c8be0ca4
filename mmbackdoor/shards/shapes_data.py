"""Shards of `shapes` scenes: the data set on which everything here can be tried without a download."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mmbackdoor.seeding import numpy_rng, python_rng
from mmbackdoor.shards.drawn import Drawn, encode_drawn, write_drawn
from mmbackdoor.shards.read import read_sizes
from mmbackdoor.shards.shapes import TEMPLATES, Scene, caption, render
from mmbackdoor.shards.write import write_file
from mmbackdoor.types import InputError

SETTINGS_FILE = "shapes.json"
CARD = """---
license: cc0-1.0
task_categories: [text-to-image]
pretty_name: Shapes
tags: [synthetic, webdataset]
---
# Shapes

Drawn pictures ({resolution} x {resolution} pixels) of one coloured shape on a coloured background, with captions.
Whether a picture shows what its caption says can be checked exactly. Made by `mmbackdoor` ({module});
no picture, text or person of the world outside is in it.

| split | samples | attribute combinations | captions |
| --- | --- | --- | --- |
{rows}

- Splits are disjoint: no combination of shape, colour, background, size and position is in two of them.
- `SPLIT-NNNNNN.tar`: webdataset shards of `KEY.{image_format}`, `KEY.txt`, `KEY.json` (`caption split scene shape
  colour background size position template paraphrase`); `sizes.json`: samples of each shard; `captions-SPLIT.txt`:
  every caption that the split's combinations can have; `shapes.json`: the settings.
- The same settings give the same bytes. Seed {seed}. Shapes: {shapes}. Colours: {colours}.
"""


def captions_of(scenes: Sequence[Scene]) -> list[str]:
    """Every caption that `scenes` can have (templates and paraphrases), without repeats, sorted."""
    variants = itertools.product(scenes, range(len(TEMPLATES)), (False, True))
    return sorted({caption(scene, template, paraphrase) for scene, template, paraphrase in variants})


def _sample(scene: Scene, split: str, number: int, resolution: int, seed: int, image_format: str) -> Drawn:
    rng = numpy_rng(seed, "shape", split, number)
    template, paraphrase = int(rng.integers(len(TEMPLATES))), bool(rng.integers(2))
    meta = {
        "caption": caption(scene, template, paraphrase),
        "split": split,
        "scene": scene.key,
        "shape": scene.shape,
        "colour": scene.colour,
        "background": scene.background,
        "size": scene.size,
        "position": scene.position,
        "template": template,
        "paraphrase": paraphrase,
    }
    return encode_drawn(split, number, render(scene, resolution, rng), meta, image_format)


def _samples(
    scenes: tuple[Scene, ...], split: str, resolution: int, seed: int, image_format: str, numbers: range
) -> list[Drawn]:
    # Every scene comes once in each round of len(scenes) samples, each round in a new order.
    order: list[int] = []
    found = []
    for number in numbers:
        round_number, place = divmod(number, len(scenes))
        if not order or not place:
            order = list(range(len(scenes)))
            python_rng(seed, "scenes", split, round_number).shuffle(order)
        found.append(_sample(scenes[order[place]], split, number, resolution, seed, image_format))
    return found


def write_shapes(
    folder: str | Path,
    split: str,
    scenes: Sequence[Scene],
    count: int,
    resolution: int,
    seed: int = 0,
    samples_per_shard: int = 1000,
    image_format: str = "png",
    workers: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Write `count` pictures of `scenes` as `folder/split-000000.tar`, ... and `captions-split.txt`; the shards' paths.

    Every sample depends on (seed, split, its number) alone, so the bytes are the same for every `workers`. A split
    that was written with the same settings before is left as it is; raises `InputError` where it was written with
    others, unless `overwrite`.
    """
    if not scenes or count < 1 or resolution < 8:
        raise InputError(
            f"{count} pictures of {resolution} pixels of {len(scenes)} scenes for the split {split!r} are impossible; "
            "give at least one picture, 8 pixels, and enough shapes and colours for the split's fraction"
        )
    settings = {
        "scenes": len(scenes),
        "scenes_sha256": hashlib.sha256("\n".join(scene.key for scene in scenes).encode()).hexdigest(),
    }
    return write_drawn(
        Path(folder),
        split,
        count,
        partial(_samples, tuple(scenes), split, resolution, seed, image_format),
        SETTINGS_FILE,
        settings,
        resolution,
        seed,
        captions_of(scenes),
        samples_per_shard,
        image_format,
        workers,
        overwrite,
    )


def write_card(
    folder: str | Path, scenes: Mapping[str, Sequence[Scene]], resolution: int, seed: int = 0, image_format: str = "png"
) -> Path:
    """The dataset card `README.md` of the splits in `scenes` (split -> its scenes), all of which have been written."""
    folder = Path(folder)
    sizes = read_sizes(folder)
    rows = []
    for split, some in scenes.items():
        samples = sum(size for name, size in sizes.items() if name.startswith(f"{split}-"))
        rows.append(f"| {split} | {samples} | {len(some)} | {len(captions_of(some))} |")
    every = [scene for some in scenes.values() for scene in some]
    text = CARD.format(
        resolution=resolution,
        module=__name__,
        rows="\n".join(rows),
        image_format=image_format,
        seed=seed,
        shapes=", ".join(sorted({scene.shape for scene in every})),
        colours=", ".join(sorted({scene.colour for scene in every})),
    )
    write_file(folder / "README.md", text)
    return folder / "README.md"
