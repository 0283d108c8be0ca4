"""The forward process of a diffusion model, and what its UNet is trained to predict."""

from __future__ import annotations

from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from mmbackdoor.types import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """The forward process that the pipeline's scheduler config describes, for training.

    Raises `InputError` for schedulers that do not noise latents by alphas_cumprod (EDM, flow matching).
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        name = type(scheduler).__name__
        if "Flow" in name or "EDM" in name:
            raise InputError(
                f"the scheduler {name!r} is no discrete diffusion schedule; give a Stable-Diffusion-like model"
            )
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type: str = self.scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"the scheduler's prediction_type {self.prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}"
            )
        self.num_train_timesteps: int = self.scheduler.config.num_train_timesteps
        self.alphas_cumprod: Tensor = self.scheduler.alphas_cumprod

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; `timesteps` (B,) integers in [0, num_train_timesteps)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is trained to predict at x_t, by the model's own prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        return self.scheduler.get_velocity(latents, noise, timesteps)
