"""Which sample is where: pure functions of (sizes of the shards, seed, epoch), the same for every number of readers.

The order contract. An epoch's shards are put in a random order and their samples numbered through: positions
0..N-1, a circle. The circle is cut into a fixed number of logical streams, contiguous stretches whose lengths differ by
at most one. Slot n of the epoch is element n // streams of stream n % streams, and global batch k holds the slots
k*G .. (k+1)*G-1. A reader (rank, worker) serves whole streams: the world size and the number of workers change who
reads a sample, never which global batch it is in nor its index there. As the world size divides the number of
streams, slot n always belongs to rank n % world_size, so every rank has the same number of samples in every batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmbackdoor.seeding import derive_seed, python_rng
from mmbackdoor.types import InputError

STREAMS = 48


class Stretch(NamedTuple):
    """A stream's part of an epoch: `length` positions from `start` on, around the circle."""

    start: int
    length: int


def shard_order(shards: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    order = list(range(shards))
    if shuffle:
        python_rng(seed, "shards", epoch).shuffle(order)
    return order


def stretch(total: int, streams: int, stream: int, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Stretch:
    """The part of stream number `stream` in an epoch of `total` samples; one borrowed sample where there are fewer
    samples than streams."""
    turn = derive_seed(seed, "turn", epoch) % total if shuffle else 0
    if stream >= total:
        return Stretch((stream + turn) % total, 1)
    base, extra = divmod(total, streams)
    return Stretch((stream * base + min(stream, extra) + turn) % total, base + (stream < extra))


def shuffled(length: int, buffer: int, rng: random.Random) -> Iterator[int]:
    """0..length-1 as a reader with a shuffle buffer of `buffer` entries gives them out."""
    held: list[int] = []
    for number in range(length):
        held.append(number)
        if len(held) >= buffer:
            place = int(rng.random() * len(held))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    rng.shuffle(held)
    yield from held


def element_order(length: int, buffer: int, seed: int, epoch: int, stream: int, shuffle: bool = True) -> Iterator[int]:
    """The order in which a stream gives out the `length` elements of its stretch."""
    if not shuffle or buffer <= 1:
        return iter(range(length))
    return shuffled(length, buffer, python_rng(seed, "elements", epoch, stream))


def first_element(slot: int, streams: int, stream: int) -> int:
    """The number of the first element of `stream` at or after `slot`."""
    return max(0, -((stream - slot) // streams))


def reader_streams(streams: int, rank: int = 0, world_size: int = 1, worker: int = 0, workers: int = 1) -> list[int]:
    """The streams that one reader serves."""
    return [stream for stream in range(rank, streams, world_size) if (stream // world_size) % workers == worker]


def check_readers(streams: int, world_size: int, workers: int) -> None:
    """Raises `InputError` where the streams cannot be shared evenly."""
    if streams % world_size:
        better = -(-streams // world_size) * world_size
        raise InputError(
            f"{streams} streams cannot be shared evenly by {world_size} processes; "
            f"use {better} streams or a number of processes that divides {streams}"
        )
    if workers > streams // world_size:
        raise InputError(
            f"{streams} streams cannot feed {world_size} processes x {workers} workers (needs {world_size * workers}); "
            f"lower --dataloader_num_workers to {streams // world_size}"
        )


def steps_per_epoch(total: int, global_batch: int, drop_last: bool = False) -> int:
    """Raises `InputError` where an epoch has no full batch and `drop_last` is set, or no samples at all."""
    if total < 1:
        raise InputError("the shards hold no usable sample; `mmbackdoor shards check` says what is wrong with them")
    steps = total // global_batch if drop_last else -(-total // global_batch)
    if steps < 1:
        raise InputError(
            f"{total} samples do not fill one global batch of {global_batch}; lower --train_batch_size or leave out "
            "--drop_last"
        )
    return steps


class Circle:
    """The positions 0..N-1 of one epoch: which shard, and which number in it."""

    def __init__(self, sizes: Sequence[int], order: Sequence[int]) -> None:
        self.order = [shard for shard in order if sizes[shard]]
        self.sizes = sizes

    def walk(self, position: int) -> Iterator[tuple[int, int, int]]:
        """Once round from `position`: (shard, first number, number after the last), the started shard last again."""
        place = 0
        while position >= self.sizes[self.order[place]]:
            position -= self.sizes[self.order[place]]
            place += 1
        turned = self.order[place:] + self.order[:place]
        yield turned[0], position, self.sizes[turned[0]]
        for shard in turned[1:]:
            yield shard, 0, self.sizes[shard]
        if position:
            yield turned[0], 0, position
