"""Optimiser and learning rate. The rate is a pure function of the step, so there is no scheduler state to restore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from mmbackdoor.config import Doc

LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "constant_then_cosine"]

OPEN_CLIP_FLAGS = {
    "lr": "train.learning_rate",
    "wd": "train.adam_weight_decay",
    "batch_size": "train.train_batch_size",
    "epochs": "train.num_train_epochs",
    "warmup": "train.lr_warmup_steps",
    "precision": "train.mixed_precision",
}
"""What open_clip's own training calls them."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large and how fast. Names are those of the diffusers training scripts."""

    GIVES_WAY: ClassVar[dict[str, str]] = {"max_train_steps": "num_train_epochs"}

    max_train_steps: Annotated[int, Field(ge=1)] | None = None
    num_train_epochs: Annotated[int | None, Field(ge=1), Doc("instead of max_train_steps, which wins over it")] = None
    train_batch_size: Annotated[int, Field(ge=1)] = 16
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lr_scheduler: LrScheduler = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float | None, Field(gt=0), Doc("gradients are cut down to it; none: never")] = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    use_ema: bool = False
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    checkpointing_steps: Annotated[int, Field(ge=1)] = 500
    checkpoints_total_limit: Annotated[int, Field(ge=1)] = 2
    resume_from_checkpoint: Annotated[str | None, Doc("a checkpoint's folder, latest, auto: if there is one, none: anew")] = "auto"
    resume_inexact: Annotated[bool, Doc("go on also where the data or their order are not the same any more")] = False
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    streams: Annotated[int, Field(ge=1), Doc("parts that shards are read in: at least processes x workers")] = 48
    drop_last: Annotated[bool, Doc("leave an epoch's last batch out instead of filling it with repeats")] = False
    train_data_upsampling_factors: Annotated[str | None, Doc("2::1 reads source a of a::b twice an epoch")] = None
    max_bad_samples: Annotated[int | None, Field(ge=0), Doc("stop above that many, over all processes")] = None
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    dry_run: Annotated[bool, Doc("say what would be trained how, on how much memory, and stop")] = False
    num_machines: Annotated[int | None, Field(ge=1), Doc("what a dry run is for; else a flag of the launcher")] = None
    num_processes: Annotated[int | None, Field(ge=1), Doc("of all machines, as num_machines")] = None


def total_steps(train: TrainConfig, samples: int | None, global_batch_size: int) -> int:
    """The number of optimisation steps; `max_train_steps` wins over `num_train_epochs` (of `samples` each)."""
    if train.max_train_steps is not None:
        return train.max_train_steps
    epochs, samples = train.num_train_epochs or 1, samples or 1
    if train.drop_last:
        # Batches of all processes, an incomplete one left out, are grouped over the ends of epochs.
        batch = global_batch_size // train.gradient_accumulation_steps
        return max(1, epochs * (samples // batch) // train.gradient_accumulation_steps)
    return epochs * math.ceil(samples / global_batch_size)


def lr_scale(step: int, steps: int, train: TrainConfig) -> float:
    """Factor on the learning rate of step `step` (from 0) of `steps`."""
    if step < train.lr_warmup_steps:
        return (step + 1) / train.lr_warmup_steps
    progress = (step - train.lr_warmup_steps) / max(1, steps - train.lr_warmup_steps)
    if train.lr_scheduler == "linear":
        return 1 - progress
    if train.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if train.lr_scheduler == "constant_then_cosine":
        return 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * progress - 1)))
    return 1.0


FUSED_DEVICES = {"cpu", "cuda"}


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW in one kernel where torch has it: on a CPU a step of many small tensors takes a quarter of the time."""
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
        fused={tensor.device.type for tensor in parameters.values()} <= FUSED_DEVICES,
    )


class Ema:
    """Exponential moving average of named tensors, with the warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: parameter.detach().clone().float() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.nn.Parameter], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            self.tensors[name].lerp_(parameter.detach().float(), 1 - decay)
