"""The denoising objective of latent diffusion, its randomness, and the batch that every diffusion method trains on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmbackdoor.seeding import hash_fraction, torch_generator


@dataclass(frozen=True)
class DiffusionBatch:
    """One process's share of the global batch of optimisation step `step` (micro-batch `micro` of it).

    `indices` are places in the global batch, over all its micro-batches: all randomness is drawn from (seed, step,
    index), never from the rank, nor from how it is cut into micro-batches. `latents` (B, C, h, w) are clean latents, or
    `None` where a method starts from noise.
    """

    step: int
    micro: int
    indices: tuple[int, ...]
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    latents: torch.Tensor | None = None
    images: torch.Tensor | None = None
    """(B, 3, H, W) in [-1, 1]; for methods that change the picture before it is encoded."""

    def place(self, index: int) -> tuple[int, int, int]:
        """What draws for the sample at `index` are named by, after the seed and their purpose."""
        # The 0 once was the micro-batch, which the index knows already; without it all runs would draw anew.
        return self.step, 0, index


def draw_noise(seed: int, batch: DiffusionBatch, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise (B, *shape), one generator a sample."""
    generators = [torch_generator(seed, "noise", *batch.place(index)) for index in batch.indices]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def draw_timesteps(
    seed: int, batch: DiffusionBatch, num_train_timesteps: int, bias: float, device: torch.device
) -> torch.Tensor:
    """Timesteps (B,), t = T * (1 - u^bias): uniform for bias 1, towards high noise above."""
    u = torch.tensor(
        [hash_fraction(seed, "timestep", *batch.place(index)) for index in batch.indices], dtype=torch.float64
    )
    timesteps = (num_train_timesteps * (1 - u**bias)).long().clamp(0, num_train_timesteps - 1)
    return timesteps.to(device)


def drop_captions(seed: int, batch: DiffusionBatch, proportion: float) -> list[str]:
    """The prompts with the given proportion made empty, for classifier-free guidance (Ho & Salimans 2022)."""
    return [
        "" if hash_fraction(seed, "empty prompt", *batch.place(index)) < proportion else prompt
        for index, prompt in zip(batch.indices, batch.prompts, strict=True)
    ]


def snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Min-SNR-gamma weights (B,) (Hang et al. 2023, eq. 8; +1 in the denominator for v-prediction)."""
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = alpha / (1 - alpha).clamp_min(1e-12)
    clipped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return (clipped / (snr + 1)).float()
    if prediction_type == "sample":
        return clipped.float()
    return (clipped / snr.clamp_min(1e-12)).float()


def denoising_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Mean squared error of the model's output (B, C, h, w) to its target, each sample times its weight (B,)."""
    per_sample = (prediction.float() - target.float()).square().mean(dim=tuple(range(1, target.ndim)))
    loss = (per_sample if weights is None else per_sample * weights).mean()
    return {"denoising_loss": loss.detach(), "loss": loss}
