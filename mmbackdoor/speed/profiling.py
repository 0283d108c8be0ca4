"""Where the time of a measurement goes: the ten operations that took longest, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

LINES = 10


def profiled(act: Callable[[], object], calls: int = 3) -> str:
    """The table of a few calls of `act`, sorted by an operation's own time."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(calls):
            act()
        if cuda:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=LINES, max_name_column_width=60) + "\n"
