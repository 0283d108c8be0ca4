"""Plain attention against torch's fused kernel in bf16 on a CPU, forward and backward, at maps of growing size: where
the first takes less time is what `models.cpu_attention.LARGEST_MAP` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from mmbackdoor.models.cpu_attention import LARGEST_MAP, plain_attention
from mmbackdoor.seeding import torch_generator
from mmbackdoor.speed.bench import Bench
from mmbackdoor.speed.rows import Goal, Row, compared
from mmbackdoor.speed.timing import Timed

MEASUREMENT = "attention"
FUSED = "torch's fused kernel"
CPU = torch.device("cpu")
HEADS, WIDTH = 8, 40
SIZES = ((64, 77), (256, 256), (1024, 77), (4096, 77), (1024, 1024), (4096, 4096))
"""Query and key positions: self-attention of small maps, and those of Stable Diffusion 1.5."""
GOAL = Goal(1.0)


def attend(bench: Bench, queries: int, keys: int) -> Callable[[], object]:
    """Forward and backward of `bench.batch_size` rows."""
    draws = torch_generator(bench.seed, "speed", "attention")
    query, key, value = (
        torch.randn(bench.batch_size, HEADS, positions, WIDTH, generator=draws).bfloat16().requires_grad_()
        for positions in (queries, keys, keys)
    )  # fmt: skip
    return lambda: F.scaled_dot_product_attention(query, key, value).sum().backward()


def measure(bench: Bench) -> list[Row]:
    """A line for each of `SIZES`; the goal is that of maps up to `LARGEST_MAP`, where plain attention is used."""
    found, where = [], replace(bench.where("bf16"), device="cpu")
    for queries, keys in SIZES:
        act = attend(bench, queries, keys)
        small = queries * keys <= LARGEST_MAP
        contestants = {FUSED: Timed(act), "plain": Timed(act, lambda: plain_attention(CPU, "bf16", largest_map=None))}
        seconds = bench.time(contestants)
        found.append(
            compared(
                MEASUREMENT, f"plain attention, {queries} x {keys}", seconds["plain"], FUSED, seconds[FUSED],
                where, unit="s", goal=GOAL if small else None,
                note=f"{bench.batch_size} rows, {HEADS} heads of {WIDTH}; {'used' if small else 'not used'} there",
            )
        )  # fmt: skip
    return found
