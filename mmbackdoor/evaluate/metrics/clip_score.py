"""How well pictures fit texts, by a CLIP that judges; it must not be the model under test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

BATCH = 64


class Judge(Protocol):
    """What `mmbackdoor.models.clip.load_judge` gives. Features are normalised, (B, D); images (B, 3, H, W) in [-1, 1]."""

    logit_scale: float

    def image_features(self, images: torch.Tensor) -> torch.Tensor: ...

    def text_features(self, texts: list[str]) -> torch.Tensor: ...


@dataclass(frozen=True)
class NamedJudge:
    """A judge and what results call it; by `sha256` the checks see a judge that is under test itself."""

    judge: Judge
    name: str
    sha256: str | None = None


def features(images: torch.Tensor, judge: Judge) -> torch.Tensor:
    """(B, D) float32 on the CPU."""
    with torch.no_grad():
        parts = [judge.image_features(images[k : k + BATCH]).float().cpu() for k in range(0, len(images), BATCH)]
    return torch.cat(parts)


def text_features(texts: Sequence[str], judge: Judge) -> torch.Tensor:
    """(B, D) float32 on the CPU; equal texts are read once."""
    unique = list(dict.fromkeys(texts))
    with torch.no_grad():
        parts = [judge.text_features(unique[k : k + BATCH]).float().cpu() for k in range(0, len(unique), BATCH)]
    index = {text: k for k, text in enumerate(unique)}
    return torch.cat(parts)[[index[text] for text in texts]]


def similarity(images: torch.Tensor, texts: Sequence[str], judge: Judge) -> torch.Tensor:
    """(B,) cosine of picture k and text k."""
    return (features(images, judge) * text_features(texts, judge)).sum(-1)


def clip_score(image_features: torch.Tensor, prompts: Sequence[str], judge: Judge) -> torch.Tensor:
    """(B,) max(cosine, 0) of pictures and the *clean* prompts (Hessel et al. 2021, without their factor 2.5)."""
    return (image_features * text_features(prompts, judge)).sum(-1).clamp_min(0)
