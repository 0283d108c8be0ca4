"""Which sample is where: pure functions of (sizes of the shards, seed, epoch), the same for every number of readers.

The order contract. An epoch's shards are put in a random order and their samples numbered through: positions
0..N-1, a circle. A source of weight w gives each of its shards w times: its whole part as copies, the rest as a stretch
that moves on from epoch to epoch, so that every sample comes equally often. The circle is cut into a fixed number of
logical streams, contiguous stretches whose lengths differ by at most one. Slot n of the epoch is element n // streams
of stream n % streams, and global batch k holds the slots k*G .. (k+1)*G-1. A reader (rank, worker) serves whole
streams: the world size and the number of workers change who reads a sample, never which global batch it is in nor its
index there. As the world size divides the number of streams, slot n always belongs to rank n % world_size, so every
rank has the same number of samples in every batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmbackdoor.seeding import derive_seed, python_rng
from mmbackdoor.types import InputError

STREAMS = 48


class Stretch(NamedTuple):
    """A stream's part of an epoch: `length` positions from `start` on, around the circle."""

    start: int
    length: int


class Piece(NamedTuple):
    """Samples `start`..`stop`-1 of the shard of number `shard`."""

    shard: int
    start: int
    stop: int


def weighted(size: int, weight: float) -> int:
    """How many samples of an epoch come from a shard of `size` samples."""
    return round(size * weight)


def epoch_pieces(
    sizes: Sequence[int], seed: int, epoch: int, shuffle: bool = True, weights: Sequence[float] = ()
) -> list[Piece]:
    """What an epoch is made of, in its order; without `weights` every shard once."""
    pieces = []
    for shard, size in enumerate(sizes):
        if not size:
            continue
        copies, rest = divmod(weighted(size, weights[shard]), size) if weights else (1, 0)
        pieces += [Piece(shard, 0, size)] * copies
        if rest:
            start = (derive_seed(seed, "part", shard) + epoch * rest) % size
            over = max(0, start + rest - size)
            pieces += [Piece(shard, start, start + rest - over)] + ([Piece(shard, 0, over)] if over else [])
    if shuffle:
        python_rng(seed, "shards", epoch).shuffle(pieces)
    return pieces


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
            f"give --streams {better}, or a number of processes that divides {streams}"
        )
    if workers > streams // world_size:
        raise InputError(
            f"{streams} streams cannot feed {world_size} processes x {workers} workers (needs {world_size * workers}); "
            f"lower --dataloader_num_workers to {streams // world_size}, or give --streams {world_size * workers}"
        )


def order_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Why what came in the order `before` cannot go on in the order `after` (see `ShardLoader.order`); `None` where it
    can, exactly."""
    if before.get("data_sha256") != after.get("data_sha256"):
        counts = [f"{order.get('samples')} samples in {order.get('files')} files" for order in (before, after)]
        return f"the data changed: {counts[0]} then, {counts[1]} now" + (
            "" if counts[0] != counts[1] else ", with other names, sizes, weights or keys"
        )
    if before.get("global_batch") != after.get("global_batch"):
        return (
            f"a batch over all processes had {before.get('global_batch')} samples and has {after.get('global_batch')} "
            "now (--train_batch_size times the number of processes)"
        )
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)} and is {after.get(key)}"
    return None


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

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)

    def walk(self, position: int) -> Iterator[Piece]:
        """Once round from `position`, the piece that is entered in its middle last again."""
        place = 0
        while position >= (length := self.pieces[place].stop - self.pieces[place].start):
            position -= length
            place += 1
        entered = self.pieces[place]
        yield entered._replace(start=entered.start + position)
        yield from self.pieces[place + 1 :]
        yield from self.pieces[:place]
        if position:
            yield entered._replace(stop=entered.start + position)
