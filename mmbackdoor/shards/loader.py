"""The samples of each global batch that belong to this process: the same batches for every number of readers.

See `order.py` for the order contract. Each sample is read at least once an epoch; the last global batch of an epoch is
filled with samples from its streams' starts (or left out, `drop_last`). A bad sample's place is taken by the next good
one of its stream, so places never shift and a resumed run need not decode what it skips.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mmbackdoor.shards.bad import BadSample, BadSamples, Problem
from mmbackdoor.shards.order import (
    STREAMS,
    Circle,
    check_readers,
    element_order,
    first_element,
    epoch_pieces,
    reader_streams,
    steps_per_epoch,
    stretch,
    weighted,
)
from mmbackdoor.shards.read import Entry, ShardIndex, expand, shard_sizes, shard_weights
from mmbackdoor.types import InputError, RunFault, Sample

CACHE_BYTES = 512 << 20


class Indexed(NamedTuple):
    """A sample and its place: `index` in the global batch of number `step`."""

    index: int
    sample: Sample
    step: int


@dataclass(frozen=True)
class Layout:
    """All that decides which sample is where."""

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    seed: int
    global_batch: int
    streams: int = STREAMS
    shuffle_buffer: int = 200 * STREAMS
    shuffle: bool = True
    drop_last: bool = False
    once: bool = False
    weights: tuple[float, ...] = ()

    @cached_property
    def total(self) -> int:
        return sum(map(weighted, self.sizes, self.weights)) if self.weights else sum(self.sizes)

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.total, self.global_batch, self.drop_last)

    @property
    def buffer(self) -> int:
        return max(1, self.shuffle_buffer // self.streams)


class _Stream:
    """One logical stream of one epoch: its elements from number `first` on, without end (`once`: to its end)."""

    def __init__(self, reader: Reader, stream: int, epoch: int) -> None:
        layout = reader.layout
        self.reader, self.stream, self.epoch = reader, stream, epoch
        self.stretch = stretch(layout.total, layout.streams, stream, layout.seed, epoch, layout.shuffle)

    def _entries(self, position: int) -> Iterator[tuple[Entry | None, tuple[int, int]]]:
        """Once round the epoch's circle: entry, (shard, number in it).

        A shard shorter than stated gives `None` for what it lacks in `once` mode; else it is passed over.
        """
        layout = self.reader.layout
        for shard, start, stop in self.reader.circle(self.epoch).walk(position):
            number = start
            found = self.reader.index.entries(layout.paths[shard], self.reader.report, start)
            for entry in itertools.islice(found, stop - start):
                yield entry, (shard, number)
                number += 1
            if layout.once:
                yield from itertools.repeat((None, (shard, -1)), stop - number)

    def _round(self, first: int) -> Iterator[Sample | None]:
        """The elements of the stretch from number `first` on, in the stream's order; `None` for a bad one."""
        layout = self.reader.layout
        length = self.stretch.length
        walk = self._entries(self.stretch.start)
        # What an earlier part of the run has given out is walked over, neither held nor decoded.
        order = element_order(length, layout.buffer, layout.seed, self.epoch, self.stream, layout.shuffle)
        past = set(itertools.islice(order, first))
        held: dict[int, tuple[Entry | None, tuple[int, int]]] = {}
        taken = 0
        for element in order:
            while element not in held and taken < length:
                entry, place = next(walk, (None, (0, -1)))
                if taken in past:
                    past.discard(taken)
                else:
                    held[taken] = (entry, place)
                taken += 1
            entry, place = held.pop(element)
            yield self.reader.decode(entry, place) if entry else None

    def _any_good(self) -> Sample:
        """The first good sample beyond the stretch: the stand-in where a whole stretch is bad."""
        for entry, place in self._entries((self.stretch.start + self.stretch.length) % self.reader.layout.total):
            sample = self.reader.decode(entry, place) if entry else None
            if sample:
                return sample
        raise RunFault(
            f"none of the {self.reader.layout.total} samples can be read; `mmbackdoor shards check` says what is wrong"
        )

    def samples(self, first: int) -> Iterator[Sample | None]:
        if self.reader.layout.once:
            yield from self._round(first)
            return
        length = self.stretch.length
        waiting = 0
        for number in itertools.count():
            good = False
            for sample in self._round(first % length if number == 0 else 0):
                if sample is None:
                    waiting += 1
                    continue
                good = True
                for _ in range(waiting + 1):
                    yield sample
                waiting = 0
            if not good and (number or first % length == 0):
                yield from itertools.repeat(self._any_good())


class Reader:
    """Serves some streams: the part of each global batch that one (rank, worker) reads."""

    def __init__(
        self,
        layout: Layout,
        rank: int,
        world_size: int,
        require_text: bool,
        cache_bytes: int,
        index: ShardIndex,
        transform: Callable[[Indexed], Any] | None,
    ) -> None:
        self.layout, self.rank, self.world_size = layout, rank, world_size
        self.require_text, self.transform, self.index = require_text, transform, index
        self.report = BadSamples()
        self._cache: dict[tuple[int, int], Sample | None] = {}
        self._cache_left = cache_bytes
        self._circles: dict[int, Circle] = {}

    def circle(self, epoch: int) -> Circle:
        if epoch not in self._circles:
            layout = self.layout
            pieces = epoch_pieces(layout.sizes, layout.seed, epoch, layout.shuffle, layout.weights)
            self._circles = {epoch: Circle(pieces)}
        return self._circles[epoch]

    def decode(self, entry: Entry, place: tuple[int, int]) -> Sample | None:
        if place in self._cache:
            return self._cache[place]
        try:
            sample = entry.decode(self.require_text)
        except BadSample as bad:
            self.report.add(bad.kind, self.layout.paths[place[0]], entry.key, bad.detail)
            sample = None
        if self._cache_left > 0:
            self._cache[place] = sample
            self._cache_left -= 1000 + (3 * sample.image.width * sample.image.height if sample else 0)
        return sample

    def parts(
        self, start_step: int, epochs: int | None, worker: int = 0, workers: int = 1
    ) -> Iterator[tuple[list[Any], list[Problem]]]:
        """For every step from `start_step` on: this reader's samples of the global batch, and the new problems."""
        layout = self.layout
        batch, streams, steps = layout.global_batch, layout.streams, layout.steps_per_epoch
        mine = reader_streams(streams, self.rank, self.world_size, worker, workers)
        for epoch in itertools.count(start_step // steps) if epochs is None else range(start_step // steps, epochs):
            begin = max(0, start_step - epoch * steps)
            readers = {
                stream: _Stream(self, stream, epoch).samples(first_element(begin * batch, streams, stream))
                for stream in mine
            }
            for step in range(begin, steps):
                found = []
                last = min((step + 1) * batch, layout.total) if layout.once else (step + 1) * batch
                for slot in range(step * batch + self.rank, last, self.world_size):
                    if slot % streams not in readers:
                        continue
                    sample = next(readers[slot % streams])
                    if sample is not None:
                        indexed = Indexed(slot - step * batch, sample, epoch * steps + step)
                        found.append(self.transform(indexed) if self.transform else indexed)
                yield found, self.report.take_news()


class ShardLoader:
    """Iterates over this process's part of each global batch: a list of `Indexed` for every step.

    Endless unless `epochs` is given; begins at `start_step` (exactly as if the steps before had been iterated). In
    training every rank gets `batch_size` samples in every step. With `once` (evaluation) there is one epoch, every
    sample comes exactly once, bad ones are left out, and the last lists are shorter or empty; ranks take as many steps.

    `streams` is part of the order (keep it when resuming, see `order()`); the world size must divide it, and
    `num_workers` is at most the streams of a process. `transform` runs where the sample is read. `cache_decoded` keeps
    decoded samples in memory, up to 512 MiB shared among the workers: treat their images as read-only. With `keys`, all
    other samples are as if they were not there. `upsampling_factors` ("2::1") weigh the sources of "a::b"; where one is
    below 1, an epoch has a part of that source, another one each time. `start_step` may be set before iterating.
    Raises `InputError` for shards that do not exist or are empty and, with `once` or `keys`, for a key that comes twice;
    `RunFault` above `max_bad_samples` bad samples.
    """

    def __init__(
        self,
        spec: str | Path | Sequence[str | Path],
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        drop_last: bool = False,
        start_step: int = 0,
        epochs: int | None = None,
        once: bool = False,
        shuffle: bool | None = None,
        shuffle_buffer: int = 200 * STREAMS,
        streams: int = STREAMS,
        require_text: bool = True,
        cache_decoded: bool = False,
        max_bad_samples: int | None = None,
        transform: Callable[[Indexed], Any] | None = None,
        keys: frozenset[str] | None = None,
        upsampling_factors: str | None = None,
    ) -> None:
        check_readers(streams, world_size, num_workers)
        if batch_size < 1:
            raise InputError(f"a batch size of {batch_size} is impossible; give 1 or more")
        self.report = BadSamples()
        paths = tuple(expand(spec))
        self._index = ShardIndex(keys)
        self.layout = Layout(
            paths,
            tuple(shard_sizes(paths, self.report, once, self._index, distinct=once or keys is not None)),
            seed,
            batch_size * world_size,
            streams,
            shuffle_buffer,
            not once if shuffle is None else shuffle,
            drop_last and not once,
            once,
            () if once else shard_weights(spec, upsampling_factors),
        )
        self.steps_per_epoch = self.layout.steps_per_epoch
        self._rank, self._world_size, self._workers = rank, world_size, num_workers
        self.start_step, self._epochs = start_step, 1 if once else epochs
        self._require_text, self._transform = require_text, transform
        self._cache_bytes = CACHE_BYTES // max(1, num_workers) if cache_decoded else 0
        self._max_bad_samples = max_bad_samples

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, bad ones among them that only decoding finds."""
        return self.layout.total

    @property
    def repeats_per_epoch(self) -> int:
        """How many samples of an epoch come a second time, to fill its last global batch."""
        if self.layout.once or self.layout.drop_last:
            return 0
        return self.steps_per_epoch * self.layout.global_batch - self.layout.total

    def mapped(self, transform: Callable[[Indexed], Any]) -> ShardLoader:
        """The same loader with `transform`, which with workers has to be picklable and to keep `index`."""
        loader = copy.copy(self)
        loader._transform = transform
        return loader

    def order(self) -> dict[str, Any]:
        """What a checkpoint stores: two loaders with the same order() give the same global batches.

        The shards count by name, number of samples and bytes: they may lie in another folder.
        """
        layout = self.layout
        weights = layout.weights or [1.0] * len(layout.paths)
        lines = [
            f"{Path(path).name} {size} {os.path.getsize(path)} {weight}"
            for path, size, weight in zip(layout.paths, layout.sizes, weights, strict=True)
        ]
        lines += sorted(self._index.keys or ())
        return {
            "data_sha256": hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest(),
            "files": len(layout.paths),
            "samples": layout.total,
            "seed": layout.seed,
            "global_batch": layout.global_batch,
            "streams": layout.streams,
            "shuffle_buffer": layout.shuffle_buffer,
            "shuffle": layout.shuffle,
            "drop_last": layout.drop_last,
        }

    def __iter__(self) -> Iterator[list[Any]]:
        reader = Reader(
            self.layout,
            self._rank,
            self._world_size,
            self._require_text,
            self._cache_bytes,
            self._index,
            self._transform,
        )
        if self._workers:
            from mmbackdoor.shards.workers import parts_of_workers

            parts = parts_of_workers(reader, self.start_step, self._epochs, self._workers)
        else:
            parts = reader.parts(self.start_step, self._epochs)
        for found, problems in parts:
            for problem in problems:
                self.report.add_problem(problem)
            self._check_bad()
            yield found

    def _check_bad(self) -> None:
        if self._max_bad_samples is not None and self.report.total > self._max_bad_samples:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.report.counts.items()))
            raise RunFault(
                f"{self.report.total} bad samples ({counts}), more than --max_bad_samples {self._max_bad_samples}; "
                "`mmbackdoor shards check` names them"
            )
