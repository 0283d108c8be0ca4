from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mmbackdoor.models.noise_schedule import NoiseSchedule
from mmbackdoor.types import InputError


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noising_and_target_follow_the_equations(prediction_type):
    schedule = NoiseSchedule(DDIMScheduler(prediction_type=prediction_type))
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 500, 900])
    noisy = schedule.add_noise(latents, noise, timesteps)
    signal = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, signal.sqrt() * latents + (1 - signal).sqrt() * noise)
    target = schedule.target(latents, noise, timesteps)
    expected = {"epsilon": noise, "sample": latents, "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * latents}
    torch.testing.assert_close(target, expected[prediction_type])


def test_schedulers_that_are_no_discrete_diffusion_are_refused():
    with pytest.raises(InputError, match="FlowMatch"):
        NoiseSchedule(FlowMatchEulerDiscreteScheduler())
