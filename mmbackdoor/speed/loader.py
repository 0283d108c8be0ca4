"""Our shard loader beside plain webdataset and open_clip's reader: a whole epoch, from opening the shards to the last
batch, workers' start included.

All read the same shards in the same process, with the same decoding to RGB and the same resizing, and give batches of
uint8 tensors (B, 3, size, size) and captions. Ours also keeps the order that makes runs resumable and independent of
the number of processes, checks every member, and counts what is bad. open_clip's is rebuilt from webdataset's stages,
with its buffers, as its own module does not run with webdataset 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import webdataset
from PIL import Image, ImageFilter
from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.decode import IMAGE_FORMATS, decode_image, decode_text
from mmbackdoor.shards.loader import Indexed, ShardLoader
from mmbackdoor.shards.read import SIZES_FILE, expand, shard_sizes
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.speed.bench import Bench
from mmbackdoor.speed.rows import Row, compared
from mmbackdoor.speed.timing import Timed
from mmbackdoor.types import InputError

MEASUREMENT = "loader"


@dataclass(frozen=True)
class Reading:
    """What is read. Without `train_data` pictures are made."""

    train_data: Annotated[str, Doc("webdataset shards; none: pictures are made")] = ""
    samples: Annotated[int, Field(ge=8), Doc("how many pictures of 256 x 256 are made")] = 3000
    num_workers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Doc("loader workers to measure with")] = (1, 2)
    loader_batch_size: Annotated[int, Field(ge=1)] = 64
    size: Annotated[int, Field(ge=8), Doc("pixels that pictures are resized to")] = 224


def make_shards(samples: int, seed: int, folder: Path) -> str:
    """JPEGs that take as long to decode as photographs: blurred noise."""
    if not (folder / SIZES_FILE).is_file():
        with ShardWriter(folder, "photo", -(-samples // 8), image_format="jpg") as writer:
            for number in range(samples):
                noise = numpy_rng(seed, "photo", number % 50).integers(0, 256, (256, 256, 3), dtype="uint8")
                image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))
                writer.write(f"{number:07d}", image, f"a photo of number {number}", {})
    return str(folder)


@dataclass(frozen=True)
class Prepare:
    """What all readers do with a decoded picture."""

    size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        # Pillow's own copy of the bytes is writable only where it is made so.
        flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        return flat.view(self.size, self.size, 3).permute(2, 0, 1)

    def ours(self, row: Indexed) -> Indexed:
        return row._replace(sample=(self(row.sample.image), row.sample.text))

    def members(self, members: dict[str, Any]) -> tuple[torch.Tensor, str]:
        extension = next(name for name in members if name in IMAGE_FORMATS)
        return self(decode_image(members[extension], extension)), decode_text(members["txt"])


def ours(reading: Reading, seed: int, paths: list[str], workers: int) -> Iterator[int]:
    loader = ShardLoader(
        paths, seed=seed, batch_size=reading.loader_batch_size, num_workers=workers, epochs=1,
        transform=Prepare(reading.size).ours,
    )  # fmt: skip
    for rows in loader:
        yield len(torch.stack([row.sample[0] for row in rows]))


def plain_webdataset(reading: Reading, seed: int, paths: list[str], workers: int) -> Iterator[int]:
    reader = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=seed).shuffle(1000)
    reader = reader.map(Prepare(reading.size).members).batched(reading.loader_batch_size)
    for pictures, _ in webdataset.WebLoader(reader, batch_size=None, num_workers=workers):
        yield len(torch.as_tensor(pictures))


def open_clip(reading: Reading, seed: int, paths: list[str], workers: int) -> Iterator[int]:
    prepare = Prepare(reading.size)
    reader = webdataset.DataPipeline(
        webdataset.SimpleShardList(paths),
        webdataset.detshuffle(bufsize=2000, initial=500, seed=seed),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.select(lambda sample: "txt" in sample and bool(IMAGE_FORMATS.keys() & sample.keys())),
        webdataset.decode("pilrgb", handler=webdataset.warn_and_continue),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=prepare, text=str.strip),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(reading.loader_batch_size, partial=True),
    )
    for pictures, _ in webdataset.WebLoader(reader, batch_size=None, num_workers=workers):
        yield len(torch.as_tensor(pictures))


READERS: dict[str, Callable[..., Iterator[int]]] = {
    "ours": ours, "webdataset": plain_webdataset, "open_clip": open_clip
}  # fmt: skip


def measure(bench: Bench, folder: Path, reading: Reading) -> list[Row]:
    """Raises `InputError` for fewer shards than workers of webdataset."""
    paths = expand(reading.train_data or make_shards(reading.samples, bench.seed, folder / "shards"))
    if len(paths) < max(reading.num_workers):
        raise InputError(
            f"{len(paths)} shards are too few for {max(reading.num_workers)} workers of webdataset; lower --num_workers"
        )
    report, found = BadSamples(), []
    total = sum(shard_sizes(paths, report))
    for workers in reading.num_workers:

        def epoch(reader: Callable[..., Iterator[int]], workers: int = workers) -> int:
            return sum(reader(reading, bench.seed, paths, workers))

        timed = {name: Timed(partial(epoch, reader)) for name, reader in READERS.items()}
        seconds = bench.time(timed)
        for name in READERS:
            if name != "ours":
                found.append(
                    compared(
                        MEASUREMENT, f"shard loader, {workers} workers", seconds["ours"], name, seconds[name],
                        bench.where("no"), unit="s/epoch", times_less=True,
                        note=f"{total} pictures, {report.total} bad",
                    )
                )  # fmt: skip
    return found
