"""The same benchmark in several processes: started by torchrun, its lines read back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmbackdoor.results.record import FILE_NAME
from mmbackdoor.speed import growth
from mmbackdoor.speed.rows import Row, read
from mmbackdoor.types import RunFault

MEASUREMENT = "processes"
COUNTS = (1, 2)
_LAUNCHERS = ("ACCELERATE_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "TORCHELASTIC_")


def torchrun(words: Sequence[str], processes: int, threads: int) -> None:
    """Run `words` (a script and its arguments) in so many processes. Raises `RunFault` where it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    environment = kept | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        said = [line for line in lines if line.startswith("error:")] or lines[-1:]
        ended = f"{processes} processes ended with exit code {done.returncode}"
        raise RunFault(f"{ended}: {' '.join(said)}")


def measure(folder: Path, recipe: str, config: Path) -> list[Row]:
    """`skd` and `clip` of `recipe` with the settings of `config`, in 1 and in 2 processes, all of half our threads."""
    threads = max(1, torch.get_num_threads() // COUNTS[-1])
    found: list[Row] = []
    seconds: dict[float, list[float]] = {}
    for count in COUNTS:
        place = folder / f"{count}-processes"
        words = [recipe, "--config", str(config), "--measure", "skd", "clip", "--output_dir", str(place)]
        torchrun(words, count, threads)
        rows = read(place / FILE_NAME)
        guided = next(row for row in rows if row.name == "attention guidance")
        seconds[count] = [guided.ours]
        found += [replace(row, measurement=MEASUREMENT) for row in rows if count > 1]
    return [*found, growth.processes_row(seconds, replace(found[0].where, processes=COUNTS[-1]))]
