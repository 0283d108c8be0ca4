"""Fine-tuning on clean pairs of picture and caption: the removal that everyone tries first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.skd import Trainable
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import (
    DiffusionBatch,
    denoising_loss,
    draw_noise,
    draw_timesteps,
    drop_captions,
    snr_weights,
)


@dataclass(frozen=True)
class Finetune:
    """The denoising objective of latent diffusion (Rombach et al. 2022, eq. 3) on clean data. Needs `--train_data`;
    the trigger is not used. Empty captions are encoded, as diffusers' scripts do; what guidance subtracts from SDXL are
    zeros, which no caption trains."""

    latents: Literal["data", "teacher"] = "data"
    trainable: Trainable = "all"
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.1
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    name: Literal["finetune"] = "finetune"

    def step(
        self, setting: DiffusionSetting, backdoor: Backdoor | None
    ) -> Callable[[DiffusionBatch], dict[str, torch.Tensor]]:
        model, seed = setting.model, setting.seed
        schedule = model.noise_schedule()

        def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
            latents = batch.latents.to(model.device)
            noise = draw_noise(seed, batch, tuple(latents.shape[1:]), latents.device)
            timesteps = draw_timesteps(seed, batch, schedule.num_train_timesteps, self.timestep_bias, latents.device)
            conditioning = model.encode(drop_captions(seed, batch, self.proportion_empty_prompts))
            output = setting.predict(schedule.add_noise(latents, noise, timesteps), timesteps, conditioning)
            weights = None
            if self.snr_gamma is not None:
                weights = snr_weights(timesteps, schedule.alphas_cumprod, self.snr_gamma, model.prediction_type)
            return denoising_loss(output, schedule.target(latents, noise, timesteps), weights)

        return step_fn
