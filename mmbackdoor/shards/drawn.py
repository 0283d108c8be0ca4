"""Shards of drawn pictures: in order whatever draws them, and written once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmbackdoor.shards.write import ShardWriter, encode_image, encode_json, tar_member, write_file

KEY = "{split}{number:08d}"


@dataclass(frozen=True)
class Drawn:
    """One sample: its members of the tar, and its caption."""

    entry: bytes
    caption: str


Draw = Callable[[range], list[Drawn]]


def encode_drawn(
    split: str, number: int, picture: np.ndarray, meta: Mapping[str, Any], image_format: str = "png"
) -> Drawn:
    """A sample of `picture`, uint8 (H, W, 3), and of `meta`, whose `caption` is its text."""
    members = {
        image_format: encode_image(picture, image_format),
        "txt": meta["caption"].encode(),
        "json": encode_json(meta),
    }
    key = KEY.format(split=split, number=number)
    return Drawn(b"".join(tar_member(f"{key}.{end}", data) for end, data in members.items()), meta["caption"])


def write_drawn(
    folder: Path,
    split: str,
    count: int,
    draw: Draw,
    settings_file: str,
    settings: Mapping[str, Any],
    resolution: int,
    seed: int = 0,
    captions: Sequence[str] | None = None,
    samples_per_shard: int = 1000,
    image_format: str = "png",
    workers: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Write samples 0 to `count` as `folder/split-000000.tar`, ...; `captions-split.txt` (`captions`, or the samples'
    own); and what decides the pictures, `settings` with the arguments that do, into `settings_file`. The shards' paths.

    `draw` gives the samples of some numbers, and can be pickled. A split that was written with the same settings
    before is left as it is; raises `InputError` where it was written with others, unless `overwrite`.
    """
    shards = [folder / f"{split}-{number:06d}.tar" for number in range(-(-count // max(1, samples_per_shard)))]
    settings = {
        "count": count,
        "resolution": resolution,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "image_format": image_format,
        **settings,
    }
    known = _known_settings(folder / settings_file)
    if known.get(split) == settings and all(shard.is_file() for shard in shards) and not overwrite:
        return shards
    step = min(max(1, samples_per_shard), 500)
    jobs = [range(start, min(start + step, count)) for start in range(0, count, step)]
    texts = set(captions or ())
    with ShardWriter(folder, split, samples_per_shard, image_format, overwrite) as writer:
        with tqdm(total=count, desc=f"{split} pictures", unit="", disable=None) as bar:
            for found in _in_order(draw, jobs, workers):
                for sample in found:
                    writer.add(sample.entry)
                if captions is None:
                    texts.update(sample.caption for sample in found)
                bar.update(len(found))
    write_file(folder / f"captions-{split}.txt", "\n".join(sorted(texts)) + "\n")
    known = _known_settings(folder / settings_file) | {split: settings}
    write_file(folder / settings_file, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return shards


def _known_settings(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_order(draw: Draw, jobs: list[range], workers: int) -> Iterator[list[Drawn]]:
    if workers < 2 or len(jobs) < 2:
        yield from map(draw, jobs)
        return
    # Spawned processes do not inherit the threads of torch, which a fork would break.
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(draw, jobs)
