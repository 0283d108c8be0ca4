"""Distillation: how far the outputs of a student are from those of a teacher, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

TextDistance = Literal["mse", "cosine"]


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample (B,) between outputs (B, ...). The teacher gives no gradient."""
    difference = student.float() - teacher.detach().float()
    return difference.square().mean(dim=tuple(range(1, difference.ndim)))


def text_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], distance: TextDistance
) -> torch.Tensor:
    """How far the outputs of a text encoder are from a teacher's, of each prompt (B,): hidden states (B, T, D), and
    pooled vectors (B, P) where there are some, each averaged and added up. `cosine` is 1 - cosine similarity of each
    vector. The teacher gives no gradient."""
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        if distance == "mse":
            total = total + squared_error(ours, theirs)
        else:
            similarity = torch.nn.functional.cosine_similarity(ours.float(), theirs.detach().float(), dim=-1)
            total = total + 1 - (similarity if similarity.ndim == 1 else similarity.mean(dim=1))
    return total
