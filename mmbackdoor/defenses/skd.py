"""SKD: self-knowledge distillation (Aravindan et al. 2025, arXiv 2508.18235, without the attention term).

The poisoned model is trusted on clean prompts, so its frozen start is the teacher: the student must predict for the
triggered prompt what the teacher predicts for the clean one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.trigger_variants import vary
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps, drop_captions
from mmbackdoor.objectives.distill import squared_error

StepFn = Callable[[DiffusionBatch], dict[str, torch.Tensor]]
Trainable = Literal["attn2_kv", "attn2", "all", "lora"]
Latents = Literal["teacher", "noise", "data"]


@dataclass(frozen=True)
class SKD:
    """L = w_p ||s(x_t, t, p') - T(x_t, t, p)||^2 + w_r ||s(x_t, t, r) - T(x_t, t, r)||^2, with p' the triggered
    prompt and r the clean or, for a share of the samples, the empty prompt.

    Differences: the paper's x_t is pure noise at every t (`latents="noise"`) and it has no retention term.
    """

    prediction_weight: Annotated[float, Field(ge=0)] = 1.0
    retention_weight: Annotated[float, Field(ge=0)] = 1.0
    proportion_empty_prompts: Annotated[float, Field(ge=0, le=1)] = 0.2
    latents: Latents = "teacher"
    trainable: Trainable = "attn2_kv"
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    trigger_variants: bool = True
    """Also train on the trigger at another place of the prompt, and doubled."""
    name: Literal["skd"] = "skd"

    def step(self, setting: DiffusionSetting, backdoor: Backdoor) -> StepFn:
        forward = distillation_forward(self, setting, backdoor)

        def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
            return forward(batch).losses

        return step_fn


class Distillation(Protocol):
    """What the drawing of a batch depends on."""

    proportion_empty_prompts: float
    timestep_bias: float
    trigger_variants: bool


@dataclass(frozen=True)
class Inputs:
    """Noisy `latents` (B, C, h, w) at `timesteps` (B,), and the two prompts that each sample is shown with."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    triggered: list[str]
    retained: list[str]


def draw_inputs(defense: Distillation, setting: DiffusionSetting, backdoor: Backdoor, batch: DiffusionBatch) -> Inputs:
    """The latents of `batch` noised to random timesteps, or pure noise where it has none; the triggered prompts, and
    the clean ones with a share made empty."""
    model, seed = setting.model, setting.seed
    schedule = model.noise_schedule()
    shape = model.latent_shape if batch.latents is None else tuple(batch.latents.shape[1:])
    noise = draw_noise(seed, batch, shape, model.device)
    timesteps = draw_timesteps(seed, batch, schedule.num_train_timesteps, defense.timestep_bias, noise.device)
    latents = noise
    if batch.latents is not None:
        latents = schedule.add_noise(batch.latents.to(noise), noise, timesteps)
    triggered = [
        vary(backdoor, prompt, seed, *batch.place(index), enabled=defense.trigger_variants)
        for index, prompt in zip(batch.indices, batch.prompts, strict=True)
    ]
    return Inputs(latents, timesteps, triggered, drop_captions(seed, batch, defense.proportion_empty_prompts))


@dataclass(frozen=True)
class Forward:
    """The outcome of one distillation forward: the losses, and what an attention term needs besides.
    `prediction_errors` (B,) are the triggered samples', without gradient."""

    losses: dict[str, torch.Tensor]
    prediction_errors: torch.Tensor
    triggered: list[str]
    timesteps: torch.Tensor
    latents: torch.Tensor
    student_maps: dict[str, torch.Tensor]
    teacher_maps: dict[str, torch.Tensor]


def distillation_forward(
    defense: SKD, setting: DiffusionSetting, backdoor: Backdoor
) -> Callable[[DiffusionBatch], Forward]:
    """The prediction and retention terms in one student forward: its rows are [triggered; retained].

    With `setting.recorder`, the cross-attention maps of the first B rows (triggered prompt for the student, clean
    prompt for the teacher) are recorded too.
    """
    model = setting.model

    def forward(batch: DiffusionBatch) -> Forward:
        size = len(batch.prompts)
        drawn = draw_inputs(defense, setting, backdoor, batch)
        latents, timesteps, triggered, retained = drawn.latents, drawn.timesteps, drawn.triggered, drawn.retained
        prompts = triggered + (retained if defense.retention_weight else [])
        empty = [k for k in range(size) if retained[k] != batch.prompts[k]] if defense.retention_weight else []
        # The teacher's rows are the distinct ones: [clean; empty]. Text that is new is encoded at once.
        clean = [*batch.prompts, *[""] * len(empty)]
        known = model.encode_for_guidance([*prompts, *clean])
        shown, asked = known.index(slice(len(prompts))), known.index(slice(len(prompts), None))
        chosen = [*range(size), *empty]
        with recorded(setting) as teacher_maps:
            predicted = setting.teacher.predict(latents[chosen], timesteps[chosen], asked)
        teacher, kept = predicted[:size], predicted[:size].clone()
        kept[empty] = predicted[size:]
        repeat = len(prompts) // size
        with recorded(setting) as student_maps:
            student = setting.predict(torch.cat([latents] * repeat), torch.cat([timesteps] * repeat), shown)
        errors = squared_error(student[:size], teacher)
        prediction_loss = errors.mean()
        losses = {"prediction_loss": prediction_loss.detach()}
        loss = defense.prediction_weight * prediction_loss
        if defense.retention_weight:
            retention_loss = squared_error(student[size:], kept).mean()
            losses["retention_loss"] = retention_loss.detach()
            loss = loss + defense.retention_weight * retention_loss
        return Forward(
            losses | {"loss": loss},
            errors.detach(),
            triggered,
            timesteps,
            latents,
            {name: maps[:size] for name, maps in student_maps.items()},
            {name: maps[:size] for name, maps in teacher_maps.items()},
        )

    return forward


def recorded(setting: DiffusionSetting) -> AbstractContextManager[dict[str, torch.Tensor]]:
    """Records cross-attention maps if the setting has a recorder; else gives an empty dictionary."""
    return setting.recorder.recording(reduce_heads=True) if setting.recorder else nullcontext({})
