from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.contrastive import caption_ids, clip_loss
from mmbackdoor.objectives.outputs import ClipOutputs

WORDS = ["red cross", "blue ring", "red cross", "star", "heart", "blue ring", "blue ring", "square"]
MODES = ("plain", "mask", "soft")


def _features(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64).unbind()
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_without_equal_captions_every_way_is_open_clips_loss():
    image, text = (values.float() for values in _features())
    expected = open_clip.ClipLoss()(image, text, torch.tensor(7.0))
    for mode in MODES:
        losses = clip_loss(image, text, torch.tensor(7.0), torch.arange(8), equal_captions=mode)
        assert torch.allclose(losses["loss"], expected) and losses["loss"] is losses["clip_loss"]
        assert losses["false_negatives"] == 0
    plain = clip_loss(image, text, torch.tensor(7.0), caption_ids(WORDS), equal_captions="plain")
    assert torch.allclose(plain["loss"], expected)


@pytest.mark.parametrize("mode", MODES)
def test_equal_captions_are_taken_as_said(mode):
    image, text = (values.float() for values in _features())
    scale = 5.0
    total = 0.0
    for logits in (scale * image @ text.T, scale * text @ image.T):
        for row in range(8):
            same = [k for k in range(8) if WORDS[k] == WORDS[row]]
            rest = [k for k in range(8) if k not in same]
            counted = {"plain": range(8), "mask": [row, *rest], "soft": range(8)}[mode]
            wanted = same if mode == "soft" else [row]
            log_sum = math.log(sum(math.exp(logits[row, k]) for k in counted))
            total -= sum(float(logits[row, k]) - log_sum for k in wanted) / len(wanted)
    losses = clip_loss(image, text, torch.tensor(scale), caption_ids(WORDS), equal_captions=mode)
    assert losses["loss"].item() == pytest.approx(total / 16, abs=1e-5)
    assert losses["false_negatives"].item() == pytest.approx((2 + 6) / 56)


def test_equal_captions_with_equal_features_pull_apart_only_where_plain():
    """Two pairs with one caption have one text: no gradient can tell them apart, and none should try."""
    image, text = (values.float()[:2] for values in _features())
    text = text[:1].expand(2, -1)
    scale, ids = torch.tensor(9.0), torch.tensor([5, 5])
    perfect = {mode: clip_loss(text, text, scale, ids, equal_captions=mode)["loss"] for mode in MODES}
    assert perfect["mask"] == 0
    assert perfect["plain"].item() == pytest.approx(math.log(2), abs=1e-5)
    image = image.clone().requires_grad_()
    clip_loss(image, text, scale, ids, equal_captions="mask")["loss"].backward()
    assert image.grad.abs().max() == 0


def test_logits_are_in_full_precision_under_autocast():
    image, text = (values.float() for values in _features())
    expected = clip_loss(image, text, torch.tensor(100.0), torch.arange(8))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_loss(image, text, torch.tensor(100.0), torch.arange(8))["loss"], expected)


def test_caption_ids_are_equal_for_equal_captions_only():
    ids = caption_ids([*WORDS, "\udcff"])
    assert (ids[:8, None] == ids[None, :8]).tolist() == [[a == b for b in WORDS] for a in WORDS]
    assert caption_ids(["star"]) == ids[3]


def test_the_objective_declares_its_views_and_hands_its_choice_on():
    image, text = (values.float() for values in _features())
    outputs = ClipOutputs({"image": image, "text": text}, torch.tensor(3.0))
    ids = caption_ids(WORDS)
    assert Clip.views == ("image", "text")
    for mode in MODES:
        losses = Clip(equal_captions=mode)(outputs, ids)
        assert torch.equal(losses["loss"], clip_loss(image, text, torch.tensor(3.0), ids, equal_captions=mode)["loss"])
