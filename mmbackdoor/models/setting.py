"""What a diffusion method works with: the model, its trainable view, its frozen teacher and the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from mmbackdoor.models.attention import AttentionRecorder
from mmbackdoor.models.diffusion import Conditioning, DiffusionModel


class Predictor(Protocol):
    """Anything that predicts like a U-Net: a frozen teacher, or another model."""

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor: ...


@dataclass(frozen=True)
class DiffusionSetting:
    """`unet` is the U-Net as prepared for training (wrapped for several processes); `teacher` the frozen start,
    `None` for a method that asks for none. `recorder` is there for methods that read cross-attention maps."""

    model: DiffusionModel
    unet: Callable[..., torch.Tensor]
    teacher: Predictor | None
    seed: int
    recorder: AttentionRecorder | None = None

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The student's output (B, C, h, w), with gradient."""
        return self.model.predict(self.unet, latents, timesteps, conditioning)
