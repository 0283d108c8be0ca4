"""`--dry_run`: what a run would do with so many processes and machines, and about how much memory each would need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmbackdoor.shards.order import check_readers, steps_per_epoch
from mmbackdoor.train.optim import TrainConfig, total_steps

MEASURED_PARAMETERS = 200_000_000
"""The largest module whose forward is measured on a CPU."""


class Planned(SystemExit):
    """Ends a dry run."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. `activations` are those of one sample, `None` where they were not measured."""

    weights: int
    held: dict[str, int]
    trained: int
    ema: int
    activations: float | None

    @staticmethod
    def of(
        module: torch.nn.Module,
        parameters: Mapping[str, torch.Tensor],
        train: TrainConfig,
        held: Mapping[str, Iterable[torch.Tensor]],
        activations: float | None,
    ) -> Memory:
        trained = sum(tensor.numel() for tensor in parameters.values() if tensor.requires_grad)
        return Memory(
            size([*module.parameters(), *module.buffers()]),
            {name: size(tensors) for name, tensors in held.items()},
            # A gradient and the two moments of AdamW, in float32.
            12 * trained,
            4 * sum(tensor.numel() for tensor in parameters.values()) if train.use_ema else 0,
            activations,
        )

    def lines(self, batch_size: int) -> list[str]:
        parts = {"weights": self.weights, **self.held, "gradients and moments of AdamW": self.trained}
        if self.ema:
            parts["moving average"] = self.ema
        if self.activations is not None:
            parts[f"activations of {batch_size} samples, as measured here"] = int(self.activations * batch_size)
        total = sum(parts.values())
        more = "" if self.activations is not None else ", and activations (not measured: a large model on a CPU)"
        head = f"memory per process, estimated: {_bytes(total)}{more}; libraries and fragments come on top"
        return [head, *(f"    {name}: {_bytes(value)}" for name, value in parts.items())]


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


class SavedTensors:
    """Counts the bytes that a forward keeps for its backward; weights among them do not count."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self.bytes = 0

    def __enter__(self) -> SavedTensors:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._hooks.__exit__(*reason)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def text(
    train: TrainConfig,
    data: Any,
    steps: int,
    world_size: int,
    memory: Memory,
    *,
    contrastive: bool = False,
    device: str = "cpu",
) -> str:
    """The plan, a line for each thing. `data`: what the run reads, a `ShardLoader` or `Prompts`, or `None`.

    Raises `InputError` where the data cannot feed that many processes.
    """
    machines = train.num_machines or 1
    processes = train.num_processes or machines * max(1, world_size // machines)
    batch = train.train_batch_size * processes
    whole = batch * train.gradient_accumulation_steps
    lines = [
        f"dry run: nothing is trained, nothing is written ({device})",
        f"processes: {processes} on {machines} machines" if machines > 1 else f"processes: {processes}",
        f"global batch: {whole} samples ({train.train_batch_size} a process x {processes} processes"
        + (f" x {train.gradient_accumulation_steps} accumulated)" if whole > batch else ")"),
    ]
    if contrastive:
        lines.append(f"negatives of each pair in a step: {batch - 1}, gathered from all processes")
    if data is not None:
        order = data.order()
        if "streams" in order:
            check_readers(train.streams, processes, train.dataloader_num_workers)
            epoch = steps_per_epoch(data.num_samples, batch, train.drop_last)
            readers = processes * max(1, train.dataloader_num_workers)
            repeats = 0 if train.drop_last else epoch * batch - data.num_samples
            lines += [
                f"samples in an epoch: {data.num_samples}, {repeats} of them repeated to fill its last batch",
                f"readers: {readers} ({max(1, train.dataloader_num_workers)} a process), each with "
                f"{train.streams / readers:g} of {train.streams} streams, about {order['files'] / readers:.1f} "
                f"of {order['files']} shards",
            ]
        else:
            epoch = math.ceil(data.num_samples / batch)
            lines.append(f"samples in an epoch: {data.num_samples}")
        lines.append(f"steps in an epoch: {epoch / train.gradient_accumulation_steps:g}")
        steps = total_steps(train, data.num_samples, whole)
    seen = steps * whole
    share = f", {seen / data.num_samples:.1f} epochs" if data is not None else ""
    lines += [f"steps: {steps} ({seen} samples{share})", *memory.lines(train.train_batch_size)]
    return "\n".join(lines)
