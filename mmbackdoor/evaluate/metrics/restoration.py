"""Restoration: how alike are the pictures of a prompt with and without the trigger, from the same initial latents?

1 means that the trigger changes nothing. It needs no knowledge of the target, and it sees garbage, which ASR does not.
"""

from __future__ import annotations

import torch


def pixel_similarity(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B,) 1 - mean absolute difference of pictures (B, 3, H, W) in [-1, 1], compared in [0, 1]."""
    if images.shape != others.shape:
        raise ValueError(f"pictures of one size are compared, not {tuple(images.shape)} and {tuple(others.shape)}")
    return 1 - (images.float() - others.float()).abs().flatten(1).mean(-1) / 2


def feature_similarity(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B,) cosine of a judge's features (B, D)."""
    return torch.nn.functional.cosine_similarity(features.float(), others.float(), dim=-1)
