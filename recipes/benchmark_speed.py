"""How fast things are here. Part `loader`: our shard loader beside plain webdataset and open_clip's reader.

All read the same shards in the same process, in turn, with the same decoding to RGB and the same resizing, and give
batches of uint8 tensors (B, 3, size, size) and captions. Ours also keeps the order that makes runs resumable and
independent of the number of processes, checks every member, and counts what is bad. open_clip's is rebuilt from
webdataset's stages, with its buffers, as its own module does not run with webdataset 1. The time is that of a whole
epoch, from opening the shards to the last batch, workers' start included.

    CPU, pictures made for it (a minute or two):
        accelerate launch -q recipes/benchmark_speed.py
    Your shards:
        accelerate launch -q recipes/benchmark_speed.py --train_data 'shards-{000000..000009}.tar' --num_workers 1 2 8

Writes into output_dir: speed.json, shards/ (where none were given), config.yaml, run.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import webdataset
from PIL import Image, ImageFilter
from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.results.record import write_text
from mmbackdoor.results.run import Run
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.decode import IMAGE_FORMATS, decode_image, decode_text
from mmbackdoor.shards.loader import Indexed, ShardLoader
from mmbackdoor.shards.read import SIZES_FILE, expand, shard_sizes
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    part: Annotated[Literal["loader"], Doc("what is measured")] = "loader"
    train_data: Annotated[str, Doc("webdataset shards; none: pictures are made")] = ""
    samples: Annotated[int, Field(ge=8), Doc("how many pictures of 256 x 256 are made")] = 3000
    num_workers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Doc("loader workers to measure with")] = (1, 2)
    batch_size: Annotated[int, Field(ge=1)] = 64
    size: Annotated[int, Field(ge=8), Doc("pixels that pictures are resized to")] = 224
    repeats: Annotated[int, Field(ge=1), Doc("times that each is measured; the median counts")] = 3
    output_dir: str = "runs/speed"
    seed: int = 0


def make_shards(cfg: Config, folder: Path) -> str:
    """JPEGs that take as long to decode as photographs: blurred noise."""
    if not (folder / SIZES_FILE).is_file():
        with ShardWriter(folder, "photo", -(-cfg.samples // 8), image_format="jpg") as writer:
            for number in range(cfg.samples):
                noise = numpy_rng(cfg.seed, "photo", number % 50).integers(0, 256, (256, 256, 3), dtype="uint8")
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


def ours(cfg: Config, paths: list[str], workers: int) -> Iterator[int]:
    transform = Prepare(cfg.size).ours
    loader = ShardLoader(
        paths, seed=cfg.seed, batch_size=cfg.batch_size, num_workers=workers, epochs=1, transform=transform
    )
    for rows in loader:
        yield len(torch.stack([row.sample[0] for row in rows]))


def plain_webdataset(cfg: Config, paths: list[str], workers: int) -> Iterator[int]:
    reader = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=cfg.seed).shuffle(1000)
    reader = reader.map(Prepare(cfg.size).members).batched(cfg.batch_size)
    for pictures, _ in webdataset.WebLoader(reader, batch_size=None, num_workers=workers):
        yield len(torch.as_tensor(pictures))


def open_clip(cfg: Config, paths: list[str], workers: int) -> Iterator[int]:
    prepare = Prepare(cfg.size)
    reader = webdataset.DataPipeline(
        webdataset.SimpleShardList(paths),
        webdataset.detshuffle(bufsize=2000, initial=500, seed=cfg.seed),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.select(lambda sample: "txt" in sample and bool(IMAGE_FORMATS.keys() & sample.keys())),
        webdataset.decode("pilrgb", handler=webdataset.warn_and_continue),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=prepare, text=str.strip),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(cfg.batch_size, partial=True),
    )
    for pictures, _ in webdataset.WebLoader(reader, batch_size=None, num_workers=workers):
        yield len(torch.as_tensor(pictures))


READERS: dict[str, Callable[..., Iterator[int]]] = {
    "ours": ours, "webdataset": plain_webdataset, "open_clip": open_clip
}  # fmt: skip


def run(cfg: Config) -> None:
    folder = Path(cfg.output_dir)
    with Run.start(cfg, "benchmark_speed", folder) as record:
        paths = expand(cfg.train_data or make_shards(cfg, folder / "shards"))
        if len(paths) < max(cfg.num_workers):
            raise InputError(
                f"{len(paths)} shards are too few for {max(cfg.num_workers)} workers of webdataset; lower --num_workers"
            )
        report = BadSamples()
        total = sum(shard_sizes(paths, report))
        rates: dict[str, dict[str, float]] = {}
        for workers in cfg.num_workers:
            found: dict[str, list[float]] = {name: [] for name in READERS}
            for _ in range(cfg.repeats):
                for name, reader in READERS.items():
                    began = time.perf_counter()
                    count = sum(reader(cfg, paths, workers))
                    found[name].append(count / (time.perf_counter() - began))
            rates[str(workers)] = {name: statistics.median(values) for name, values in found.items()}
            row = rates[str(workers)]
            best = max(value for name, value in row.items() if name != "ours")
            shown = ", ".join(f"{name} {value:.0f}" for name, value in row.items())
            ratio = row["ours"] / best
            print(f"{workers} workers: {shown} samples/s; ours / the faster other: {ratio:.2f}", flush=True)
        write_text(folder / "speed.json", json.dumps({"samples": total, "samples_per_second": rates}, indent=1) + "\n")
        record.counters |= {"samples": total, "bad_samples": report.to_dict()}


if __name__ == "__main__":
    main(Config, run, __doc__)
