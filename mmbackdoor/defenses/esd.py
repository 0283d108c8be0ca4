"""ESD: erasing by negative guidance, here of a trigger (Gandikota et al. 2023, arXiv 2303.07345).

Where `skd` draws the triggered prediction to the clean one, this goes past it, away from what the trigger did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.skd import Latents, StepFn, Trainable, draw_inputs
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.objectives.distill import squared_error


@dataclass(frozen=True)
class ESD:
    """L = ||s(x_t, t, p') - (T(x_t, t, p) - eta (T(x_t, t, p') - T(x_t, t, p)))||^2, with p' the triggered and p the
    clean prompt, T the frozen start and s the student.

    Differences: the paper erases a concept c with the target T(x_t, t, empty) - eta (T(x_t, t, c) - T(x_t, t, empty))
    (its training objective); here the clean prompt takes the empty one's place, since the rest of the prompt shall be
    drawn. Its x_t are halfway samples of the student, here they are noised pictures of the teacher (`latents`). There is a
    retention term as in `skd`, off by default as in the paper.
    """

    negative_guidance: Annotated[float, Field(ge=0)] = 1.0
    """eta of the paper; 0 is `skd`."""
    retention_weight: Annotated[float, Field(ge=0)] = 0.0
    proportion_empty_prompts: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Of the retention term: without effect where that has no weight."""
    latents: Latents = "teacher"
    trainable: Trainable = "attn2"
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    trigger_variants: bool = True
    name: Literal["esd"] = "esd"

    def step(self, setting: DiffusionSetting, backdoor: Backdoor) -> StepFn:
        def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
            size = len(batch.prompts)
            drawn = draw_inputs(self, setting, backdoor, batch)
            prompts = drawn.triggered + (drawn.retained if self.retention_weight else [])
            latents, timesteps = torch.cat([drawn.latents] * 2), torch.cat([drawn.timesteps] * 2)
            known = setting.model.encode(drawn.triggered + list(batch.prompts))
            triggered, clean = setting.teacher.predict(latents, timesteps, known).split(size)
            target = clean - self.negative_guidance * (triggered - clean)
            rows = slice(0, len(prompts))
            student = setting.predict(latents[rows], timesteps[rows], setting.model.encode_for_guidance(prompts))
            loss = prediction_loss = squared_error(student[:size], target).mean()
            losses = {"prediction_loss": prediction_loss.detach()}
            if self.retention_weight:
                retained = setting.model.encode_for_guidance(drawn.retained)
                kept = setting.teacher.predict(drawn.latents, drawn.timesteps, retained)
                retention_loss = squared_error(student[size:], kept).mean()
                losses["retention_loss"] = retention_loss.detach()
                loss = loss + self.retention_weight * retention_loss
            return losses | {"loss": loss}

        return step_fn
