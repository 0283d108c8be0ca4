"""Shards of `pairs` scenes: two things in a picture, for models that need more than `shapes` to go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.drawn import Drawn, encode_drawn, write_drawn
from mmbackdoor.shards.pairs import COLOURS, SIZES, STYLES, WORDINGS, caption, draw_scene, render
from mmbackdoor.shards.read import read_sizes
from mmbackdoor.shards.shapes import SHAPES
from mmbackdoor.shards.write import write_file
from mmbackdoor.types import InputError

SETTINGS_FILE = "pairs.json"
SCENES_VERSION = 1
"""Counts up when the same settings would give other pictures, so that old shards are not taken for new ones."""
CARD = """---
license: cc0-1.0
task_categories: [text-to-image]
pretty_name: Pairs of shapes
tags: [synthetic, webdataset]
---
# Pairs of shapes

Drawn pictures ({resolution} x {resolution} pixels) of two coloured shapes side by side, or one in the middle, on plain,
striped and dotted backgrounds, with captions. Whether a picture shows what its caption says can be checked exactly.
Made by `mmbackdoor` ({module}); no picture, text or person of the world outside is in it.

| split | samples | different captions |
| --- | --- | --- |
{rows}

- Splits are disjoint: two things (shape and colour, in either order) that are together in a picture of one split are
  together in no other; nor is one thing alone on a background of the same colour.
- `SPLIT-NNNNNN.tar`: webdataset shards of `KEY.{image_format}`, `KEY.txt`, `KEY.json` (`caption split scene left right
  background style wording`); `sizes.json`: samples of each shard; `captions-SPLIT.txt`: the captions of the split's
  samples; `pairs.json`: the settings.
- The same settings give the same bytes. Seed {seed}. Shapes: {shapes}. Colours: {colours}. Sizes: {sizes}, stated or
  not. Backgrounds: {styles}.
"""


def _sample(split: str, number: int, resolution: int, seed: int, image_format: str) -> Drawn:
    scene = draw_scene(split, number, seed)
    rng = numpy_rng(seed, "pair", split, number)
    wording = int(rng.integers(WORDINGS))
    meta = {
        "caption": caption(scene, wording),
        "split": split,
        "scene": scene.key,
        **asdict(scene),
        "wording": wording,
    }
    return encode_drawn(split, number, render(scene, resolution, rng), meta, image_format)


def _samples(split: str, resolution: int, seed: int, image_format: str, numbers: range) -> list[Drawn]:
    return [_sample(split, number, resolution, seed, image_format) for number in numbers]


def write_pairs(
    folder: str | Path,
    split: str,
    count: int,
    resolution: int,
    seed: int = 0,
    samples_per_shard: int = 1000,
    image_format: str = "png",
    workers: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Write `count` pictures of `split` as `folder/split-000000.tar`, ... and their captions; the shards' paths.

    Every sample depends on (seed, split, its number) alone, so the bytes are the same for every `workers`. A split
    that was written with the same settings before is left as it is; raises `InputError` where it was written with
    others, unless `overwrite`.
    """
    if count < 1 or resolution < 8:
        raise InputError(
            f"{count} pictures of {resolution} pixels for the split {split!r} are impossible; give at least one "
            "picture and 8 pixels"
        )
    settings = {"scenes_version": SCENES_VERSION}
    return write_drawn(
        Path(folder),
        split,
        count,
        partial(_samples, split, resolution, seed, image_format),
        SETTINGS_FILE,
        settings,
        resolution,
        seed,
        None,
        samples_per_shard,
        image_format,
        workers,
        overwrite,
    )


def write_pairs_card(
    folder: str | Path, splits: Sequence[str], resolution: int, seed: int = 0, image_format: str = "png"
) -> Path:
    """The dataset card `README.md` of `splits`, all of which have been written."""
    folder = Path(folder)
    sizes = read_sizes(folder)
    rows = []
    for split in splits:
        samples = sum(size for name, size in sizes.items() if name.startswith(f"{split}-"))
        captions = (folder / f"captions-{split}.txt").read_text("utf-8").count("\n")
        rows.append(f"| {split} | {samples} | {captions} |")
    text = CARD.format(
        resolution=resolution,
        module=__name__,
        rows="\n".join(rows),
        image_format=image_format,
        seed=seed,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        sizes=", ".join(SIZES),
        styles=", ".join(STYLES),
    )
    write_file(folder / "README.md", text)
    return folder / "README.md"
