"""Peak memory of some work, in a process of its own: a peak never falls, so one process can show one peak only."""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mmbackdoor.types import RunFault

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_bytes(prepare: Callable[..., Callable[[], object]], *arguments: object, calls: int = 2) -> int:
    """The largest number of bytes held while `prepare(*arguments)()` is called `calls` times, what it prepared
    included and what the imports took left out: on the accelerator, where one is used, else in main memory.

    `prepare` is a function of a module, the arguments can be pickled. Raises `RunFault` where the process dies.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, prepare, arguments, calls))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        said = f"measuring the memory of {prepare.__name__} ended with exit code {process.exitcode}"
        raise RunFault(f"{said}; its message stands above") from None
    finally:
        process.join()


def _measure(answer: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple, calls: int) -> None:
    on_device = torch.cuda.is_available()
    before = _held("VmRSS")
    act = prepare(*arguments)
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    for _ in range(calls):
        act()
    answer.send(torch.cuda.max_memory_allocated() if on_device else max(0, _held("VmHWM") - before))
    answer.close()


def _held(name: str) -> int:
    """Bytes of main memory now (`VmRSS`) or at most so far (`VmHWM`); without /proc, both are the latter."""
    if _STATUS.exists():
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        # Then what loading took counts too, for everyone alike.
        return
