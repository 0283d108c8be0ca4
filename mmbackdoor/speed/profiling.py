"""Where the time of a measurement goes: the ten operations that took longest, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mmbackdoor.results.record import write_text

LINES = 10


def write_profile(path: Path, act: Callable[[], object], calls: int = 3) -> None:
    """Call `act` a few times and write the table, sorted by an operation's own time, to `path`."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(calls):
            act()
        if cuda:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    write_text(path, found.key_averages().table(sort_by=order, row_limit=LINES, max_name_column_width=60) + "\n")
