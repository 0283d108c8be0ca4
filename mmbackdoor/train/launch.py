"""The accelerator of a training run, as its flags and the launcher ask for it."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.types import InputError


def make_accelerator(train: TrainConfig | None = None, seed: int = 0) -> Accelerator:
    """Works alike under `accelerate launch`, `torchrun` and plain `python`.

    Raises `InputError` where the launcher was asked for several processes but started one, which
    `accelerate launch --cpu --num_processes N` does silently.
    """
    asked = int(os.environ.get("ACCELERATE_NUM_PROCESSES", "1") or 1)
    precision = train.mixed_precision if train else "no"
    # A second accelerator of one process would keep the precision of the first.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if asked > accelerator.num_processes:
        raise InputError(
            f"{asked} processes were asked for but {accelerator.num_processes} started; "
            f"on CPUs start them with `torchrun --nproc_per_node {asked}`"
        )
    # Nothing of ours draws from the global generators; libraries that do shall repeat themselves.
    set_seed(seed)
    return accelerator
