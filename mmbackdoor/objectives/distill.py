"""Distillation: how far the outputs of a student are from those of a teacher, sample by sample."""

from __future__ import annotations

import torch


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample (B,) between outputs (B, ...). The teacher gives no gradient."""
    difference = student.float() - teacher.detach().float()
    return difference.square().mean(dim=tuple(range(1, difference.ndim)))
