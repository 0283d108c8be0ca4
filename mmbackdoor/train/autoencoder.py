"""What training an autoencoder needs around the loop: its step, and what it is worth at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmbackdoor.models.autoencoder import Reconstructor
from mmbackdoor.objectives.autoencoder import Reconstruction, autoencoder_loss
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise
from mmbackdoor.train.loop import StepFn


def autoencoder_step(
    module: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    shape: tuple[int, int, int],
    reconstruction: Reconstruction,
    kl_weight: float,
    seed: int,
) -> StepFn:
    """The loss of a batch of pictures. `module` is a `Reconstructor` as prepared for training; its latents have the
    shape (C, h, w)."""

    def step_fn(batch: DiffusionBatch) -> dict[str, Tensor]:
        noise = draw_noise(seed, batch, shape, batch.images.device)
        reconstructions, mean, log_variance = module(batch.images, noise)
        return autoencoder_loss(reconstructions, batch.images, mean, log_variance, reconstruction, kl_weight)

    return step_fn


@dataclass(frozen=True)
class Quality:
    """`psnr` in dB, the mean over `pictures` pictures; mean and standard deviation over all values of their latents."""

    psnr: float
    latent_mean: float
    latent_std: float
    pictures: int


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture (B,), both (B, 3, H, W) in [-1, 1]; at most 100."""
    error = (reconstructions.float().clamp(-1, 1) - images.float()).square().mean(dim=(1, 2, 3))
    # The peak of [-1, 1] is 2.
    return 10 * torch.log10(4 / error.clamp_min(4e-10))


@torch.no_grad()
def measure(module: Reconstructor, batches: Iterator[DiffusionBatch], pictures: int) -> Quality:
    """`module` on the first `pictures` pictures of `batches`, with the posterior's mean as the latent (no noise)."""
    ratios, count, total, squares, seen = 0.0, 0, 0.0, 0.0, 0
    for batch in batches:
        images = batch.images[: pictures - seen]
        mean = module.autoencoder.encode(images).latent_dist.mode()
        ratios += psnr(module.autoencoder.decode(mean, return_dict=False)[0], images).double().sum().item()
        values = mean.double()
        total, squares = total + values.sum().item(), squares + values.square().sum().item()
        count, seen = count + values.numel(), seen + len(images)
        if seen >= pictures:
            break
    average = total / count
    return Quality(ratios / seen, average, (squares / count - average**2) ** 0.5, seen)
