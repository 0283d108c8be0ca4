"""Shards of `shapes` scenes: the data set on which everything here can be tried without a download."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from mmbackdoor.seeding import numpy_rng, python_rng
from mmbackdoor.shards.read import read_sizes
from mmbackdoor.shards.shapes import TEMPLATES, Scene, caption, render
from mmbackdoor.shards.write import ShardWriter, encode_image, encode_json, tar_member, write_file
from mmbackdoor.types import InputError

KEY = "{split}{number:08d}"
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


def _sample(scene: Scene, split: str, number: int, resolution: int, seed: int, image_format: str) -> bytes:
    rng = numpy_rng(seed, "shape", split, number)
    template, paraphrase = int(rng.integers(len(TEMPLATES))), bool(rng.integers(2))
    text = caption(scene, template, paraphrase)
    meta = {
        "caption": text,
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
    members = {
        image_format: encode_image(render(scene, resolution, rng), image_format),
        "txt": text.encode(),
        "json": encode_json(meta),
    }
    key = KEY.format(split=split, number=number)
    return b"".join(tar_member(f"{key}.{extension}", data) for extension, data in members.items())


def _samples(job: tuple[tuple[Scene, ...], str, range, int, int, str]) -> list[bytes]:
    scenes, split, numbers, resolution, seed, image_format = job
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
    folder = Path(folder)
    settings = {
        "count": count,
        "resolution": resolution,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "image_format": image_format,
        "scenes": len(scenes),
        "scenes_sha256": hashlib.sha256("\n".join(scene.key for scene in scenes).encode()).hexdigest(),
    }
    known = _settings(folder)
    shards = [folder / f"{split}-{number:06d}.tar" for number in range(-(-count // max(1, samples_per_shard)))]
    if known.get(split) == settings and all(shard.is_file() for shard in shards) and not overwrite:
        return shards
    step = min(max(1, samples_per_shard), 500)
    jobs = [
        (tuple(scenes), split, range(start, min(start + step, count)), resolution, seed, image_format)
        for start in range(0, count, step)
    ]
    with ShardWriter(folder, split, samples_per_shard, image_format, overwrite) as writer:
        with tqdm(total=count, desc=f"{split} pictures", unit="", disable=None) as bar:
            for found in _in_order(jobs, workers):
                for entry in found:
                    writer.add(entry)
                bar.update(len(found))
    write_file(folder / f"captions-{split}.txt", "\n".join(captions_of(scenes)) + "\n")
    known = _settings(folder) | {split: settings}
    write_file(folder / SETTINGS_FILE, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return shards


def _settings(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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


def _in_order(jobs: list[tuple], workers: int) -> Iterator[list[bytes]]:
    if workers < 2 or len(jobs) < 2:
        yield from map(_samples, jobs)
        return
    # Spawned processes do not inherit the threads of torch, which a fork would break.
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_samples, jobs)
