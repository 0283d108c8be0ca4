"""How far a model has moved from the one that it came from, measured on features. The anchor gives no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mmbackdoor.objectives.contrastive import pair_logits
from mmbackdoor.objectives.outputs import ClipOutputs


def feature_distance(features: Tensor, anchor: Tensor) -> Tensor:
    """The mean squared distance of unit vectors (B, D) to those of the anchor: 2 - 2 cosine, from 0 to 4, in fp32."""
    return (features.float() - anchor.detach().float()).square().sum(1).mean()


def similarity_distillation(
    outputs: ClipOutputs,
    anchor: ClipOutputs,
    picture: str = "image",
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Cross-entropy between the anchor's distribution over the captions of the global batch, for each picture, and the
    model's, and over the pictures for each caption, averaged (as `DistillClipLoss` of open_clip), in fp32.

    The model sees its pictures in the view `picture`, the anchor in the view `image`; each has its own temperature.
    Processes as in `clip_loss`.
    """
    logits = pair_logits(
        outputs.features[picture], outputs.features["text"], outputs.logit_scale, rank, world_size
    )
    with torch.no_grad():
        targets = pair_logits(anchor.features["image"], anchor.features["text"], anchor.logit_scale, rank, world_size)
    losses = [
        -(target.softmax(1) * values.log_softmax(1)).sum(1).mean()
        for values, target in zip(logits, targets, strict=True)
    ]
    return sum(losses) / 2
