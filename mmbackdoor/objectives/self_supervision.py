"""Self-supervision within a modality: a picture or a caption and its augmented view together, others apart."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackdoor.objectives.contrastive import EqualCaptions, Pairs, gathered, pair_logits
from mmbackdoor.objectives.outputs import ClipOutputs

Direction = Literal["one_way", "symmetric"]


def of_pictures(equal_captions: EqualCaptions) -> EqualCaptions:
    """How equal captions count between two pictures. They are two pictures: no positives, so `soft` leaves them out."""
    return "plain" if equal_captions == "plain" else "mask"


def view_loss(
    clean: Tensor,
    augmented: Tensor,
    logit_scale: Tensor,
    captions: Tensor,
    *,
    direction: Direction = "one_way",
    equal_captions: EqualCaptions = "soft",
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """InfoNCE of unit features (B, D) of one modality in two views, in fp32.

    `one_way` tells each clean row its augmented one among all augmented ones (Bansal et al. 2023, arXiv 2303.03323,
    equation 3); `symmetric` is the mean of both directions. Processes as in `clip_loss`.
    """
    logits = pair_logits(clean, augmented, logit_scale, rank, world_size)
    pairs = Pairs.of(captions, clean.device, rank, world_size)
    if direction == "one_way":
        return pairs.cross_entropy(logits[0], equal_captions)
    return sum(pairs.cross_entropy(values, equal_captions) for values in logits) / 2


def self_supervision(
    outputs: ClipOutputs,
    captions: Tensor,
    *,
    direction: Direction = "one_way",
    equal_captions: EqualCaptions = "soft",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """Self-supervision of pictures and of captions, half each (Bansal et al. 2023, arXiv 2303.03323, equation 3).

    Needs the views image, text, image_aug and text_aug; the temperature is the model's own. Returns `image_ssl_loss`,
    `text_ssl_loss`, their sum `loss`, and `false_negatives`. Between pictures, `soft` counts equal captions as `mask`
    does: two pictures with one caption are two pictures.
    """
    parts = {}
    for name, mode in (("image", of_pictures(equal_captions)), ("text", equal_captions)):
        parts[f"{name}_ssl_loss"] = 0.5 * view_loss(
            outputs.features[name],
            outputs.features[f"{name}_aug"],
            outputs.logit_scale,
            captions,
            direction=direction,
            equal_captions=mode,
            rank=rank,
            world_size=world_size,
        )
    pairs = Pairs.of(captions, outputs.logit_scale.device, rank, world_size)
    return parts | {"false_negatives": pairs.false_negatives, "loss": parts["image_ssl_loss"] + parts["text_ssl_loss"]}


def simclr_loss(
    first: Tensor,
    second: Tensor,
    temperature: float,
    captions: Tensor,
    *,
    equal_captions: EqualCaptions = "soft",
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """NT-Xent of unit vectors (B, D) of two augmented views, in fp32 (Chen et al. 2020, arXiv 2002.05709, equation 1).

    Each vector is told its partner among the other view's and its own view's vectors of the global batch, without
    itself. Processes and `equal_captions` as in `self_supervision`, for pictures.
    """
    pairs = Pairs.of(captions, first.device, rank, world_size)
    left_out = torch.zeros_like(pairs.equal) if of_pictures(equal_captions) == "plain" else pairs.other
    itself = torch.zeros_like(pairs.equal).scatter(1, pairs.own[:, None], True)
    with torch.autocast(first.device.type, enabled=False):
        views = (first.float(), second.float())
        everyone = [gathered(view, world_size) for view in views]
        losses = []
        for own, (across, within) in zip(views, (everyone[::-1], everyone), strict=True):
            other_view = (own @ across.T / temperature).masked_fill(left_out, -torch.inf)
            same_view = (own @ within.T / temperature).masked_fill(left_out | itself, -torch.inf)
            losses.append(F.cross_entropy(torch.cat([other_view, same_view], 1), pairs.own))
    return sum(losses) / 2
