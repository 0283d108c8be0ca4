"""The accelerator of a training run, as its flags and the launcher ask for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed

from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.types import Diverged, InputError


LONGEST_WAIT = timedelta(hours=12)
"""How long processes wait for one that works alone, as when it judges all pictures of ImageNet: NCCL ends them after 10
minutes by default. A process that was killed is noticed by its closed connections and by the launcher, not by this."""


def make_accelerator(train: TrainConfig | None = None, seed: int = 0, output_dir: str | None = None) -> Accelerator:
    """Works alike under `accelerate launch`, `torchrun` and plain `python`.

    Raises `InputError` where the launcher was asked for several processes but started one, which
    `accelerate launch --num_processes N` does silently with `--cpu` or without several GPUs.
    """
    if train and not train.dry_run and (train.num_machines or train.num_processes):
        raise InputError(
            "--num_machines and --num_processes after the recipe's name only say what a --dry_run is for; to start "
            "several processes, put them before it: accelerate launch -q --num_processes N recipes/X.py"
        )
    precision = train.mixed_precision if train else "no"
    # A second accelerator of one process would keep the precision of the first.
    AcceleratorState._reset_state()
    tracker = train.report_to if train else "none"
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"--report_to {tracker} needs the package {tracker}; install it")
    accelerator = Accelerator(
        # Several processes without an accelerator talk by gloo only where the CPU is asked for.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision, log_with=None if tracker == "none" else tracker, project_dir=output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    # accelerate's launcher of one process always names a precision, and an address to meet at only where it was asked
    # for more; how many these were it does not say. Whoever started several (torchrun, mpirun) gives each a world size.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and accelerator.num_processes == 1:
        if "WORLD_SIZE" not in os.environ:
            raise InputError(
                "`accelerate launch` was asked for several processes but started one, as it does on CPUs and where "
                "there are fewer than two GPUs; start them with `torchrun --nproc_per_node N`, or give "
                "--num_processes 1 (and unset MASTER_ADDR where it is exported)"
            )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        # accelerate's launcher gives a process one thread unless it is told otherwise (--num_cpu_threads_per_process).
        if os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Nothing of ours draws from the global generators; libraries that do shall repeat themselves.
    set_seed(seed)
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Around what a process does alone (its share of the pictures, writing a model): all leave it at once.

    Raises `Diverged` on every process where one did: the others would wait for it for ever, or for another thing.
    """
    fault = None
    try:
        yield
    except Diverged as error:
        fault = error
    faults = accelerator.reduce(torch.tensor([float(fault is not None)], device=accelerator.device), "sum")
    if fault is not None:
        raise fault
    if faults.item() > 0:
        raise Diverged("the pictures or the weights of another process are not finite; its own message says which")
