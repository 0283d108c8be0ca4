"""Image-text contrastive losses over the global batch; open_clip's own gather the features and make the logits.

Captions that occur twice in a batch make false negatives. Each loss takes them in one of three ways: `plain` (as
negatives, like the original), `mask` (left out), `soft` (as positives: they share the target of a softmax).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, distributed

EqualCaptions = Literal["plain", "mask", "soft"]


def caption_ids(captions: Sequence[str]) -> Tensor:
    """int64 (B,): equal for equal captions, on every process."""
    digests = (hashlib.sha256(caption.encode("utf-8", "surrogateescape")).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests])


@dataclass(frozen=True)
class Pairs:
    """This process's B rows against the W * B columns of all processes: `own` (B,) is the column of each row itself,
    `equal` (B, W * B) says which columns have the row's caption, its own among them."""

    own: Tensor
    equal: Tensor

    @staticmethod
    def of(captions: Tensor, device: torch.device, rank: int = 0, world_size: int = 1) -> Pairs:
        captions = captions.to(device)
        everyone = captions
        if world_size > 1:
            parts = [torch.empty_like(captions) for _ in range(world_size)]
            distributed.all_gather(parts, captions.contiguous())
            everyone = torch.cat(parts)
        own = torch.arange(len(captions), device=device) + len(captions) * rank
        return Pairs(own, captions[:, None] == everyone[None])

    @property
    def other(self) -> Tensor:
        """(B, W * B): columns with the row's caption that are another pair's."""
        return self.equal.scatter(1, self.own[:, None], False)

    @property
    def false_negatives(self) -> Tensor:
        """The share of pairs of different rows whose captions are equal."""
        return self.other.sum() / max(1, self.equal.numel() - len(self.equal))

    def cross_entropy(self, logits: Tensor, equal_captions: EqualCaptions) -> Tensor:
        """Of telling each row its own column by `logits` (B, W * B)."""
        targets = self.own
        if equal_captions == "mask":
            logits = logits.masked_fill(self.other, -torch.inf)
        elif equal_captions == "soft":
            targets = self.equal.float() / self.equal.sum(1, keepdim=True)
        return F.cross_entropy(logits, targets)


def pair_logits(
    first: Tensor, second: Tensor, logit_scale: Tensor, rank: int = 0, world_size: int = 1
) -> tuple[Tensor, Tensor]:
    """fp32 (B, W * B): the rows of `first` against all processes' `second`, and of `second` against all `first`.

    Gradients flow to every process's features: averaged over the processes, as DDP does, those of a mean over rows are
    the ones that one process with the whole batch has.
    """
    # Imported here: `mmbackdoor list` reads the objectives, and open_clip takes seconds.
    from open_clip import ClipLoss

    gather = world_size > 1
    criterion = ClipLoss(local_loss=gather, gather_with_grad=gather, rank=rank, world_size=world_size)
    with torch.autocast(first.device.type, enabled=False):
        return criterion.get_logits(first.float(), second.float(), logit_scale.float())


def gathered(features: Tensor, world_size: int = 1) -> Tensor:
    """(W * B, D): the `features` (B, D) of all processes, in order of rank, with gradient to all of them."""
    if world_size == 1:
        return features
    return torch.cat(distributed.nn.all_gather(features))


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
    logits = pair_logits(image_features, text_features, logit_scale, rank, world_size)
    pairs = Pairs.of(captions, image_features.device, rank, world_size)
    loss = sum(pairs.cross_entropy(values, equal_captions) for values in logits) / 2
    return {"clip_loss": loss, "false_negatives": pairs.false_negatives, "loss": loss}


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    captions: Tensor,
    *,
    equal_captions: EqualCaptions = "soft",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """Sigmoid loss of unit features (B, D), in fp32: the sum over all B^2 pairs of the global batch, divided by B
    (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

    `plain` is `open_clip.loss.SigLipLoss`; `soft` takes other pairs with the row's caption as matching, `mask` leaves
    them out of the sum. Processes as in `clip_loss`; returns `siglip_loss`, `false_negatives` and `loss`.
    """
    from open_clip.loss import SigLipLoss

    with torch.autocast(image_features.device.type, enabled=False):
        texts = gathered(text_features.float(), world_size)
        logits = SigLipLoss().get_logits(image_features.float(), texts, logit_scale.float(), logit_bias.float())
    pairs = Pairs.of(captions, image_features.device, rank, world_size)
    matching = pairs.equal if equal_captions == "soft" else pairs.equal & ~pairs.other
    terms = F.logsigmoid(torch.where(matching, logits, -logits))
    if equal_captions == "mask":
        terms = terms.masked_fill(pairs.other, 0.0)
    loss = -terms.sum() / len(terms)
    return {"siglip_loss": loss, "false_negatives": pairs.false_negatives, "loss": loss}


def cyclic_losses(image_features: Tensor, text_features: Tensor, world_size: int = 1) -> tuple[Tensor, Tensor]:
    """In-modal and cross-modal cyclic consistency of unit features (B, D), in fp32 (Goel et al. 2022, arXiv 2205.14459,
    equations 4 and 3): the sums over all pairs (j, k) of (<I_j, I_k> - <T_j, T_k>)^2 and of
    (<I_j, T_k> - <I_k, T_j>)^2, each divided by the size of the global batch. Processes as in `clip_loss`."""
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = image_features.float(), text_features.float()
        images, texts = gathered(image, world_size), gathered(text, world_size)
        in_modal = image @ images.T - text @ texts.T
        cross_modal = image @ texts.T - text @ images.T
        return in_modal.square().sum() / len(image), cross_modal.square().sum() / len(image)
