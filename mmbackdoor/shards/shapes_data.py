"""Shards of `shapes` scenes: the data set on which everything here can be tried without a download."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mmbackdoor.seeding import numpy_rng, python_rng
from mmbackdoor.shards.shapes import TEMPLATES, Scene, caption, render
from mmbackdoor.shards.write import ShardWriter, encode_image, encode_json, tar_member, write_file
from mmbackdoor.types import InputError

KEY = "{split}{number:08d}"


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

    Every sample depends on (seed, split, its number) alone, so the bytes are the same for every `workers`.
    """
    if not scenes:
        raise InputError(f"the split {split!r} has no scenes; give it a larger fraction or more shapes and colours")
    step = min(samples_per_shard, 500)
    jobs = [
        (tuple(scenes), split, range(start, min(start + step, count)), resolution, seed, image_format)
        for start in range(0, count, step)
    ]
    with ShardWriter(folder, split, samples_per_shard, image_format, overwrite) as writer:
        for entry in itertools.chain.from_iterable(_in_order(jobs, workers)):
            writer.add(entry)
    write_file(Path(folder) / f"captions-{split}.txt", "\n".join(captions_of(scenes)) + "\n")
    return [Path(folder) / f"{split}-{number:06d}.tar" for number in range(len(writer.sizes))]


def _in_order(jobs: list[tuple], workers: int) -> Iterator[list[bytes]]:
    if workers < 2 or len(jobs) < 2:
        yield from map(_samples, jobs)
        return
    # Spawned processes do not inherit the threads of torch, which a fork would break.
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_samples, jobs)
