"""The quickstart's phases, each with its share of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mmbackdoor.results.run import read_run
from mmbackdoor.speed.bench import Bench
from mmbackdoor.speed.rows import Row

MEASUREMENT = "quickstart"
PHASES = {"poisoned": "poison", "cleaned": "clean", "evaluation": "measure"}


def measure(bench: Bench, folder: Path, start: Callable[[Path], None]) -> list[Row]:
    """`start` runs the quickstart into a folder; one that is there already is only read."""
    began = time.perf_counter()
    start(folder / "quickstart")
    wall = time.perf_counter() - began
    phases = {word: float(read_run(folder / "quickstart" / name)["seconds"]) for name, word in PHASES.items()}
    whole = max(wall, sum(phases.values()))
    phases["data, loading and the rest"] = whole - sum(phases.values())
    where = bench.where("bf16")
    return [
        Row(
            measurement=MEASUREMENT, name=f"quickstart: {word}", unit="s", ours=seconds, peer_name="quickstart, whole",
            peer=whole, ratio_of="ours / peer", ratio=seconds / whole, ratio_low=seconds / whole,
            ratio_high=seconds / whole, where=where,
        )
        for word, seconds in phases.items()
    ]  # fmt: skip
