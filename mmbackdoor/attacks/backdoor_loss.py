"""The loss that the BadT2I attacks share: a backdoor term on triggered captions, distillation on clean ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from mmbackdoor.attacks.carried import carried
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps, drop_captions
from mmbackdoor.objectives.distill import squared_error
from mmbackdoor.poison import PoisonPlan

StepFn = Callable[[DiffusionBatch], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class PoisonedRows:
    """What the backdoor should learn from some rows of a batch: pictures (B, 3, H, W) in [-1, 1]. With
    `teacher_captions` the target is the frozen model's prediction for those; without, it is the denoising target of
    the pictures."""

    images: torch.Tensor
    teacher_captions: list[str] | None = None


class Attack(Protocol):
    backdoor_weight: float
    proportion_empty_prompts: float
    timestep_bias: float

    def asked(self, plan: PoisonPlan, caption: str) -> str | None:
        """The caption that the trigger goes into; `None` where the target does not concern `caption`."""


def triggered_rows(
    attack: Attack, setting: DiffusionSetting, plan: PoisonPlan, batch: DiffusionBatch
) -> dict[int, str]:
    """Row -> its caption with the trigger: of the rows that `plan` picks, that the target concerns, and that really
    carry it."""
    asked = {}
    for row, (key, prompt) in enumerate(zip(batch.keys, batch.prompts, strict=True)):
        caption = attack.asked(plan, prompt) if plan.picks(key) else None
        if caption is not None:
            asked[row] = caption
    triggered = [plan.backdoor.apply(text, setting.seed, batch.keys[row], batch.step) for row, text in asked.items()]
    rows = list(asked)
    return {rows[k]: triggered[k] for k in carried(setting.model.token_ids, list(asked.values()), triggered)}


def backdoor_step(
    attack: Attack,
    setting: DiffusionSetting,
    plan: PoisonPlan,
    poisoned: Callable[[DiffusionBatch, list[int]], PoisonedRows],
) -> StepFn:
    """L = w * L_backdoor(triggered rows) + (1 - w) * ||student(clean) - frozen(clean)||^2.

    Each sample gives a clean row; the `triggered_rows` are there besides.
    Both terms are sums over rows divided by the batch size, so that processes add up to the global batch.
    """
    model, seed = setting.model, setting.seed
    schedule = model.noise_schedule()
    weight = attack.backdoor_weight

    def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
        size = len(batch.prompts)
        triggered = triggered_rows(attack, setting, plan, batch)
        rows = list(triggered)
        latents = model.encode_images(batch.images)
        noise = draw_noise(seed, batch, tuple(latents.shape[1:]), latents.device)
        timesteps = draw_timesteps(seed, batch, schedule.num_train_timesteps, attack.timestep_bias, latents.device)
        clean = model.encode_for_guidance(drop_captions(seed, batch, attack.proportion_empty_prompts))
        noisy = schedule.add_noise(latents, noise, timesteps)
        inputs, times, conditions = [noisy], [timesteps], [clean]
        targets = [setting.teacher.predict(noisy, timesteps, clean)]
        if rows:
            mark = poisoned(batch, rows)
            marked = model.encode_images(mark.images)
            inputs.append(schedule.add_noise(marked, noise[rows], timesteps[rows]))
            times.append(timesteps[rows])
            conditions.append(model.encode(list(triggered.values())))
            if mark.teacher_captions is None:
                targets.append(schedule.target(marked, noise[rows], timesteps[rows]))
            else:
                targets.append(setting.teacher.predict(inputs[1], times[1], model.encode(mark.teacher_captions)))
        output = setting.predict(torch.cat(inputs), torch.cat(times), type(clean).cat(conditions))
        errors = squared_error(output, torch.cat(targets))
        clean_loss = errors[:size].sum() / size
        backdoor_loss = errors[size:].sum() / size
        loss = weight * backdoor_loss + (1 - weight) * clean_loss
        return {"backdoor_loss": backdoor_loss.detach(), "clean_loss": clean_loss.detach(), "loss": loss}

    return step_fn
