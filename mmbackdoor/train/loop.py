"""The training loop. It is the only one: a method is the `step_fn` that it calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from mmbackdoor.models.cpu_attention import plain_attention
from mmbackdoor.seeding import derive_seed
from mmbackdoor.train.optim import Ema, TrainConfig, lr_scale
from mmbackdoor.types import Diverged

StepFn = Callable[[Any], dict[str, torch.Tensor]]


def _averaged(accelerator: Accelerator, losses: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Metrics averaged over micro-batches and processes, with one communication."""
    names = sorted(losses[0])
    values = torch.stack(
        [torch.stack([part[name].detach().float().reshape(()) for part in losses]).mean() for name in names]
    )
    values = accelerator.reduce(values, "mean").tolist()
    return dict(zip(names, values, strict=True))


def _refuse_divergence(
    step: int,
    loss: float,
    norm: Any,
    micro_losses: list[dict[str, torch.Tensor]],
    seen: list[list[str]],
    *,
    scaled: bool,
) -> None:
    """Raises `Diverged` where the mean `loss`, or without a scaler the gradients' `norm`, is not finite."""
    if not math.isfinite(loss):
        ours = [keys for part, keys in zip(micro_losses, seen, strict=True) if not part["loss"].isfinite().all()]
        what, keys = f"the loss of step {step} is not finite", (ours or seen)[0]
    elif norm is not None and not scaled and not math.isfinite(float(norm)):
        what, keys = f"the gradients of step {step} are not finite though its loss is", seen[0]
    else:
        return
    raise Diverged(
        f"{what} (samples {', '.join(keys[:8])}); the last checkpoint is intact. Lower --learning_rate, or leave out "
        "these samples"
    )


def training_steps(
    accelerator: Accelerator,
    step_fn: StepFn,
    batches: Iterator[Any],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    train: TrainConfig,
    *,
    steps: int,
    start_step: int = 0,
    model: torch.nn.Module | None = None,
    ema: Ema | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield `(step, metrics)` after each optimisation step, from `start_step` + 1 to `steps`.

    `step_fn(batch)` returns parts `*_loss` and their sum `loss`; each batch of `batches` is one micro-batch and has
    `keys`. `model` is the prepared module whose gradients are synchronised only on the last micro-batch of a step.

    Raises `Diverged` with the keys of the batch at the first loss that is not finite, and, without a scaler of losses
    (which leaves such steps out), at the first gradients that are not; in every process, before the weights change.
    """
    for step in range(start_step, steps):
        rate = train.learning_rate * lr_scale(step, steps, train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        micro_losses, seen = [], []
        for micro in range(train.gradient_accumulation_steps):
            batch = next(batches)
            # Ours draws nothing from the global generators; a library's dropout shall go on alike after a restart. It
            # draws one mask for a whole tensor, which cannot follow the places in the global batch: so here alone the
            # rank counts, else all processes would share their masks. With dropout, the number of processes matters.
            torch.manual_seed(derive_seed(seed, "libraries", step, micro, accelerator.process_index))
            synchronise = micro + 1 == train.gradient_accumulation_steps or model is None
            attention = plain_attention(accelerator.device, accelerator.mixed_precision)
            with nullcontext() if synchronise else accelerator.no_sync(model), attention:
                with accelerator.autocast():
                    losses = step_fn(batch)
                micro_losses.append(losses)
                seen.append(batch.keys)
                accelerator.backward(losses["loss"] / train.gradient_accumulation_steps)
        # Cut down to infinity they stay as they are, and their norm is known.
        norm = accelerator.clip_grad_norm_(list(parameters.values()), train.max_grad_norm or math.inf)
        # But for the gradients themselves the one place where processes wait for each other, and for a GPU: what is not
        # finite in one of them is not finite in the mean, so all stop together.
        metrics = _averaged(accelerator, micro_losses) | {"learning_rate": rate}
        _refuse_divergence(step + 1, metrics["loss"], norm, micro_losses, seen, scaled=accelerator.scaler is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(parameters, step)
        if norm is not None and math.isfinite(float(norm)):
            metrics["grad_norm"] = float(norm)
        yield step + 1, metrics

