"""Image-text contrastive losses over the global batch; `open_clip.ClipLoss` gathers features and makes the logits.

Captions that occur twice in a batch make false negatives. Each loss takes them in one of three ways: `plain` (as
negatives, like the original), `mask` (left out of the softmax), `soft` (all equal captions share the target).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import Tensor, distributed

EqualCaptions = Literal["plain", "mask", "soft"]


def caption_ids(captions: Sequence[str]) -> Tensor:
    """int64 (B,): equal for equal captions, on every process."""
    digests = (hashlib.sha256(caption.encode("utf-8", "surrogateescape")).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests])


def _gathered(values: Tensor, world_size: int) -> Tensor:
    if world_size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size)]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    captions: Tensor,
    *,
    equal_captions: EqualCaptions = "soft",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """Symmetric InfoNCE of unit features (B, D), in fp32 (Radford et al. 2021, figure 3).

    `logit_scale` multiplies cosines (it is not a logarithm); `captions` (B,) are `caption_ids`. With several processes,
    each of which has B pairs, negatives come from all of them and gradients flow to all of them: averaged over the
    processes, as DDP does, they are those of one process with the whole batch. Also returned: `false_negatives`, the
    share of pairs of different rows whose captions are equal.
    """
    gather = world_size > 1
    criterion = ClipLoss(local_loss=gather, gather_with_grad=gather, rank=rank, world_size=world_size)
    with torch.autocast(image_features.device.type, enabled=False):
        logits = criterion.get_logits(image_features.float(), text_features.float(), logit_scale.float())
        own = criterion.get_ground_truth(image_features.device, len(image_features))
        captions = captions.to(image_features.device)
        equal = captions[:, None] == _gathered(captions, world_size)[None]
        other = equal.scatter(1, own[:, None], False)
        targets: Tensor = own
        if equal_captions == "mask":
            logits = tuple(values.masked_fill(other, -torch.inf) for values in logits)
        elif equal_captions == "soft":
            targets = equal.float() / equal.sum(1, keepdim=True)
        loss = sum(F.cross_entropy(values, targets) for values in logits) / 2
    negatives = max(1, equal.numel() - len(equal))
    return {"clip_loss": loss, "false_negatives": other.sum() / negatives, "loss": loss}
