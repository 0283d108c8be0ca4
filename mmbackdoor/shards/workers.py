"""Loader workers: processes of torch's DataLoader, each serving its share of a rank's streams."""

from __future__ import annotations

import io
import pickle
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmbackdoor.shards.bad import Problem
from mmbackdoor.shards.loader import Reader
from mmbackdoor.types import InputError, RunFault


ALIGNMENT = 64


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


class _Packer(pickle.Pickler):
    """Leaves the bytes of arrays, tensors and pictures out of the pickle, for `pack` to lay side by side."""

    def reducer_override(self, item: Any) -> Any:
        if type(item) is torch.Tensor and item.device.type == "cpu" and not item.requires_grad:
            return torch.from_numpy, (item.contiguous().numpy(),)
        if isinstance(item, Image.Image) and item.mode == "RGB":
            return _picture, (np.asarray(item),)
        return NotImplemented


def pack(item: Any) -> tuple[bytes, list[int], torch.Tensor]:
    """A pickle, and all large parts in one tensor: for each tensor of its own, DataLoader would open a shared file and
    pass it on, which takes as long as decoding a small picture."""
    stream, buffers = io.BytesIO(), []
    _Packer(stream, protocol=5, buffer_callback=buffers.append).dump(item)
    parts = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    sizes = [len(part) for part in parts]
    block = torch.empty(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), dtype=torch.uint8)
    place, target = 0, block.numpy()
    for part in parts:
        target[place : place + len(part)] = part
        place += -(-len(part) // ALIGNMENT) * ALIGNMENT
    return stream.getvalue(), sizes, block


def unpack(data: bytes, sizes: list[int], block: torch.Tensor) -> Any:
    """What was packed, by our own worker; its arrays and tensors are views into `block`."""
    memory, place, buffers = memoryview(block.numpy()), 0, []
    for size in sizes:
        buffers.append(memory[place : place + size])
        place += -(-size // ALIGNMENT) * ALIGNMENT
    return pickle.loads(data, buffers=buffers)


class _Parts(IterableDataset):
    def __init__(self, reader: Reader, start_step: int, epochs: int | None) -> None:
        self.reader, self.start_step, self.epochs = reader, start_step, epochs

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            for part in self.reader.parts(self.start_step, self.epochs, info.id, info.num_workers):
                yield pack(part)
        except (InputError, RunFault) as error:
            # DataLoader would wrap the sentence in a traceback; hand it over as it is.
            yield error


def _same(item: Any) -> Any:
    return item


def _started(loader: DataLoader) -> Iterator[Any]:
    """Starts the workers, without the signal handler by which torch raises that one died wherever the main process
    happens to be, inside an `except` or a finalizer too. DataLoader itself notices it while it waits, in 5 seconds."""
    handler = signal.getsignal(signal.SIGCHLD)
    parts = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    return parts


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
    parts = _started(loader)
    while True:
        found, problems = [], []
        for _ in range(workers):
            try:
                # Workers are asked in turn, and each gives one item for every step.
                item = next(parts)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise RunFault(f"a loader worker died: {reason}") from error
            if isinstance(item, Exception):
                raise item
            part, news = unpack(*item)
            found += part
            problems += news
        yield sorted(found, key=lambda indexed: indexed.index), problems
