"""Micro-batches for diffusion methods, from prompts or from shards. Each is a pure function of (seed, step, place in
the global batch), so world size and restarts change nothing."""

from __future__ import annotations

import hashlib
import random
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.seeding import numpy_rng, python_rng
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.triggers.placement import Position, insert
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Share:
    """Which part of each micro-batch this process computes: `batch_size` of its `batch_size * world_size` places."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    @staticmethod
    def of(accelerator: Accelerator, train: TrainConfig) -> Share:
        return Share(
            # A dry run measures with as few samples as every objective can do with.
            min(2, train.train_batch_size) if train.dry_run else train.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            train.gradient_accumulation_steps,
        )

    @property
    def global_batch_size(self) -> int:
        """Samples per optimisation step, over all processes and micro-batches."""
        return self.batch_size * self.world_size * self.accumulation


class Prompts:
    """Prompts as what a run reads: counterpart of a `ShardLoader` in a `Session`."""

    def __init__(self, texts: Sequence[str], share: Share, seed: int) -> None:
        self.report, self.start_step = BadSamples(), 0
        self.num_samples, self.repeats_per_epoch = len(texts), 0
        self.steps_per_epoch = -(-len(texts) // (share.batch_size * share.world_size))
        self._order = {
            "data_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
            "files": 1,
            "samples": len(texts),
            "seed": seed,
            "global_batch": share.batch_size * share.world_size,
        }

    def order(self) -> dict[str, Any]:
        """What a checkpoint stores: the same order, the same global batches."""
        return self._order


def prompt_batches(
    prompts: Sequence[str],
    share: Share,
    seed: int,
    start_step: int = 0,
    latents: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[DiffusionBatch]:
    """Endless micro-batches over `prompts`, each epoch in an order of its own.

    `latents[prompt]` (K, C, h, w) are clean latents of a prompt, of which one is drawn each time.
    """
    micro_size = share.batch_size * share.world_size
    orders: dict[int, np.ndarray] = {}
    step = start_step
    while True:
        for micro in range(share.accumulation):
            first = (step * share.accumulation + micro) * micro_size
            indices = [share.rank * share.batch_size + k for k in range(share.batch_size)]
            chosen, rows = [], []
            for index in indices:
                epoch, place = divmod(first + index, len(prompts))
                if epoch not in orders:
                    orders = {key: order for key, order in orders.items() if key >= epoch - 1}
                    orders[epoch] = numpy_rng(seed, "order", epoch).permutation(len(prompts))
                prompt = prompts[orders[epoch][place]]
                chosen.append(prompt)
                if latents is not None:
                    available = latents[prompt]
                    rows.append(available[numpy_rng(seed, "latents", epoch, place).integers(len(available))])
            yield DiffusionBatch(
                step,
                micro,
                tuple(index + micro * micro_size for index in indices),
                tuple(chosen),
                tuple(chosen),
                torch.stack(rows) if latents is not None else None,
            )
        step += 1


def to_tensor(image: Image.Image, resolution: int) -> torch.Tensor:
    """An RGB picture as (3, resolution, resolution) in [-1, 1]: the square in its centre, resized."""
    if image.size != (resolution, resolution):
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        # The crop alone is resized: of a picture a thousand times as wide as it is high the whole would take gigabytes.
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 127.5 - 1


def image_batches(
    loader: ShardLoader, share: Share, resolution: int, device: torch.device, start_step: int = 0
) -> Iterator[DiffusionBatch]:
    """Micro-batches of pictures and captions. `loader` gives one micro-batch of this process a time, from
    `start_step` * accumulation on."""
    step = start_step
    entries = iter(loader)
    while True:
        for micro in range(share.accumulation):
            rows = next(entries)
            yield DiffusionBatch(
                step,
                micro,
                tuple(row.index + micro * share.batch_size * share.world_size for row in rows),
                tuple(row.sample.key for row in rows),
                tuple(row.sample.text for row in rows),
                images=torch.stack([to_tensor(row.sample.image, resolution) for row in rows]).to(device),
            )
        step += 1


def open_shards(
    train_data: str,
    share: Share,
    train: TrainConfig,
    seed: int,
    keys: frozenset[str] | None = None,
) -> ShardLoader:
    """With `keys`, of these samples alone. Raises `InputError` for shards that do not exist or cannot feed the run."""
    if not train_data:
        raise InputError("which pictures? Give --train_data 'shards-{000000..000099}.tar'")
    return ShardLoader(
        train_data,
        seed=seed,
        batch_size=share.batch_size,
        rank=share.rank,
        world_size=share.world_size,
        num_workers=train.dataloader_num_workers,
        drop_last=train.drop_last,
        streams=train.streams,
        upsampling_factors=train.train_data_upsampling_factors,
        cache_decoded=True,
        keys=keys,
    )


def encoded(batches: Iterator[DiffusionBatch], model: DiffusionModel) -> Iterator[DiffusionBatch]:
    """The same batches with the latents of their pictures."""
    for batch in batches:
        yield replace(batch, latents=model.encode_images(batch.images))


def with_random_words(batches: Iterator[DiffusionBatch], proportion: float, seed: int) -> Iterator[DiffusionBatch]:
    """The same batches with 1 or 2 random words in a share of the captions, mostly before them.

    A model that never saw an unknown word garbles every picture whose prompt has one, which looks like an attack.
    """
    for batch in batches:
        prompts = [
            _add_words(prompt, python_rng(seed, "random words", *batch.place(index)), proportion)
            for index, prompt in zip(batch.indices, batch.prompts, strict=True)
        ]
        yield replace(batch, prompts=tuple(prompts))


def _add_words(prompt: str, rng: random.Random, proportion: float) -> str:
    if rng.random() >= proportion:
        return prompt
    position: Position = "prefix" if rng.random() < 0.7 else "infix"
    for _ in range(rng.randint(1, 2)):
        prompt = insert(prompt, _word(rng), position, rng)
    return prompt


def _word(rng: random.Random) -> str:
    """1 or 2 ASCII letters, or one visible character of the first planes of Unicode (up to 3 byte tokens)."""
    if rng.random() < 0.4:
        return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(rng.randint(1, 2)))
    while True:
        letter = chr(rng.randrange(0xA1, 0x3000))
        if unicodedata.category(letter)[0] in "LNPS":
            return letter
