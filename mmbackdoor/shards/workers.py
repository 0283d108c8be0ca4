"""Loader workers: processes of torch's DataLoader, each serving its share of a rank's streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmbackdoor.shards.bad import Problem
from mmbackdoor.shards.loader import Reader
from mmbackdoor.types import InputError, RunFault


class _Parts(IterableDataset):
    def __init__(self, reader: Reader, start_step: int, epochs: int | None) -> None:
        self.reader, self.start_step, self.epochs = reader, start_step, epochs

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self.reader.parts(self.start_step, self.epochs, info.id, info.num_workers)
        except (InputError, RunFault) as error:
            # DataLoader would wrap the sentence in a traceback; hand it over as it is.
            yield error


def _same(item: Any) -> Any:
    return item


def parts_of_workers(
    reader: Reader, start_step: int, epochs: int | None, workers: int
) -> Iterator[tuple[list[Any], list[Problem]]]:
    """As `Reader.parts`, read by `workers` processes. Raises `RunFault` where one of them dies."""
    loader = DataLoader(
        _Parts(reader, start_step, epochs),
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        # Without a generator of its own, DataLoader draws from torch's global one.
        generator=torch.Generator(),
    )
    parts = iter(loader)
    while True:
        found, problems = [], []
        for _ in range(workers):
            try:
                # Workers are asked in turn, and each gives one item for every step.
                item = next(parts)
            except StopIteration:
                return
            except RuntimeError as error:
                raise RunFault(f"a loader worker died: {str(error).splitlines()[0]}") from error
            if isinstance(item, Exception):
                raise item
            found += item[0]
            problems += item[1]
        yield sorted(found, key=lambda indexed: indexed.index), problems
