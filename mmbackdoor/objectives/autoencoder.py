"""The objective of a variational autoencoder whose latents a diffusion model is trained on.

Kingma & Welling 2014 (arXiv 1312.6114), eq. 10; Rombach et al. 2022 (arXiv 2112.10752), sec. 3.1 and appendix G.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reconstruction = Literal["l1", "l2"]


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)) of each sample, in nats (B,); inputs (B, C, h, w).

    1/2 sum(mean^2 + exp(log_variance) - 1 - log_variance), appendix B of Kingma & Welling.
    """
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=tuple(range(1, mean.ndim)))


def autoencoder_loss(
    reconstructions: Tensor,
    images: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    reconstruction: Reconstruction = "l2",
    kl_weight: float = 1e-6,
) -> dict[str, Tensor]:
    """Reconstruction error of images (B, 3, H, W) in [-1, 1] plus `kl_weight` times the KL of their posteriors.

    Differences: Rombach et al. add a perceptual and an adversarial term, which small drawn pictures do not need; and
    the error is a mean over pixels here, a sum there, so that one weight suits every resolution of the picture.
    """
    difference = reconstructions.float() - images.float()
    error = (difference.abs() if reconstruction == "l1" else difference.square()).mean()
    kl = kl_divergence(mean, log_variance).mean()
    loss = error + kl_weight * kl
    return {"reconstruction_loss": error.detach(), "kl_loss": (kl_weight * kl).detach(), "loss": loss}
