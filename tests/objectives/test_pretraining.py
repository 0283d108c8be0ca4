"""Every objective of pre-training: its value by its definition, what it does with equal captions, two processes."""

from __future__ import annotations

import math
from dataclasses import replace

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackdoor.objectives.contrastive import caption_ids, clip_loss, cyclic_losses, siglip_loss
from mmbackdoor.objectives.outputs import PROJECTION, VIEWS, ClipOutputs
from mmbackdoor.objectives.pretraining import OBJECTIVES, Clip, ClipSsl, CyClip, SigLip, Slip
from mmbackdoor.objectives.self_supervision import self_supervision, simclr_loss, view_loss
from mmbackdoor.types import InputError
from tests.objectives.gloo import WORDS, Towers, check_two_processes, gradients, inputs

MODES = ("plain", "mask", "soft")
ALONE = torch.arange(8)
IDS = caption_ids(WORDS)
ALL = [kind(equal_captions=mode) for kind in OBJECTIVES.values() for mode in MODES]
ALL.append(ClipSsl(direction="symmetric", clip_weight=0.5, ssl_weight=2.0))


def outputs(scale: float = 5.0, bias: float | None = -2.0) -> ClipOutputs:
    with torch.no_grad():
        features, _, _ = Towers()(inputs())
    return ClipOutputs(features, torch.tensor(scale), None if bias is None else torch.tensor(bias))


class Call:
    """An objective as the processes are given it."""

    def __init__(self, objective) -> None:
        self.objective = objective

    def __call__(self, given: ClipOutputs, captions: Tensor, rank: int, world_size: int) -> dict[str, Tensor]:
        return self.objective(given, captions, rank=rank, world_size=world_size)


def name_of(objective) -> str:
    return f"{objective.name} {objective.equal_captions} {'symmetric' if 'symmetric' in str(objective) else ''}"


def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    check_two_processes({name_of(objective): Call(objective) for objective in ALL}, tmp_path)


@pytest.mark.parametrize("objective", ALL, ids=name_of)
def test_an_objective_says_what_it_does(objective):
    """Parts that add up, a gradient for what it looks at, and steps down that gradient that make it smaller."""
    losses = objective(outputs(), IDS)
    parts = [value for name, value in losses.items() if name.endswith("_loss")]
    assert parts and sum(parts).item() == pytest.approx(losses["loss"].item(), rel=1e-5)
    assert losses["false_negatives"].item() == pytest.approx((2 + 6) / 56)
    assert set(objective.views) <= set(VIEWS) and objective.views[:2] == ("image", "text")
    towers = Towers()
    optimizer = torch.optim.Adam(towers.parameters(), 0.02)
    first = None
    for _ in range(10):
        _, values = gradients(towers, Call(objective))
        first = values["loss"] if first is None else first
        optimizer.step()
    assert values["loss"] < 0.9 * first


@pytest.mark.parametrize("objective", ALL, ids=name_of)
def test_no_view_is_asked_for_in_vain(objective):
    """The loss changes with each of its views, and needs no other."""
    given = outputs()
    wanted = {*objective.views, *(f"{PROJECTION}{view}" for view in ("image_aug", "image_aug2"))}
    given = replace(given, features={view: values for view, values in given.features.items() if view in wanted})
    before = objective(given, IDS)["loss"]
    for view in objective.views:
        names = [view, PROJECTION + view]
        other = {name: values.roll(1, 0) if name in names else values for name, values in given.features.items()}
        assert objective(replace(given, features=other), IDS)["loss"] != before, view


def test_siglip_is_open_clips_loss_where_captions_differ_and_where_it_is_plain():
    given = outputs()
    image, text = given.features["image"], given.features["text"]
    expected = open_clip.loss.SigLipLoss()(image, text, given.logit_scale, given.logit_bias)
    for mode in MODES:
        assert torch.allclose(SigLip(equal_captions=mode)(given, ALONE)["loss"], expected)
    assert torch.allclose(SigLip(equal_captions="plain")(given, IDS)["loss"], expected)


@pytest.mark.parametrize("mode", MODES)
def test_siglip_is_a_sum_over_all_pairs_divided_by_the_batch(mode):
    given = outputs()
    total = 0.0
    for row in range(8):
        for column in range(8):
            logit = 5.0 * float(given.features["image"][row] @ given.features["text"][column]) - 2.0
            same = WORDS[row] == WORDS[column]
            if mode == "mask" and same and row != column:
                continue
            sign = 1 if row == column or (mode == "soft" and same) else -1
            total += math.log1p(math.exp(-sign * logit))
    assert SigLip(equal_captions=mode)(given, IDS)["loss"].item() == pytest.approx(total / 8, rel=1e-5)


def test_siglip_needs_a_bias():
    with pytest.raises(InputError, match="logit bias"):
        SigLip()(outputs(bias=None), IDS)
    assert SigLip.logit_init == {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}


def test_cyclic_consistency_is_that_of_the_paper():
    image, text = (outputs().features[view].double() for view in ("image", "text"))
    in_modal, cross_modal = 0.0, 0.0
    for j in range(8):
        for k in range(8):
            in_modal += float(image[j] @ image[k] - text[j] @ text[k]) ** 2
            cross_modal += float(image[j] @ text[k] - image[k] @ text[j]) ** 2
    found = cyclic_losses(image, text)
    assert [value.item() for value in found] == pytest.approx([in_modal / 8, cross_modal / 8], rel=1e-5)
    losses = CyClip()(outputs(), IDS)
    assert losses["in_modal_loss"].item() == pytest.approx(0.25 * in_modal / 8, rel=1e-5)
    assert losses["cross_modal_loss"].item() == pytest.approx(0.25 * cross_modal / 8, rel=1e-5)
    assert losses["clip_loss"] == Clip()(outputs(), IDS)["loss"]


def test_one_way_self_supervision_is_the_published_one():
    """CE(s I I~', y) and CE(s T T~', y), half each; the symmetric form is open_clip's loss of the two views."""
    given = outputs()
    features, scale = given.features, given.logit_scale
    halves = [
        F.cross_entropy(scale * features[view] @ features[f"{view}_aug"].T, torch.arange(8)) / 2
        for view in ("image", "text")
    ]
    ssl = self_supervision(given, IDS, equal_captions="plain")
    assert torch.allclose(ssl["image_ssl_loss"], halves[0]) and torch.allclose(ssl["text_ssl_loss"], halves[1])
    both = self_supervision(given, ALONE, direction="symmetric")
    criterion = open_clip.ClipLoss()
    expected = [criterion(features[view], features[f"{view}_aug"], scale) / 2 for view in ("image", "text")]
    assert torch.allclose(both["loss"], sum(expected))
    assert not torch.allclose(both["loss"], self_supervision(given, ALONE)["loss"])


def test_weights_of_clip_ssl_do_what_they_say():
    given = outputs()
    clip = Clip()(given, IDS)["loss"]
    ssl = self_supervision(given, IDS)["loss"]
    losses = ClipSsl(clip_weight=0.3, ssl_weight=2.0)(given, IDS)
    assert losses["loss"].item() == pytest.approx(0.3 * clip.item() + 2 * ssl.item(), rel=1e-5)
    alone = ClipSsl(clip_weight=0.0)(given, IDS)
    assert alone["loss"].item() == pytest.approx(ssl.item(), rel=1e-5) and "clip_loss" not in alone
    with pytest.raises(InputError, match="nothing to learn"):
        ClipSsl(clip_weight=0.0, ssl_weight=0.0)


def test_between_pictures_equal_captions_are_never_positives():
    given = outputs()
    pictures = (given.features["image"], given.features["image_aug"], given.logit_scale, IDS)
    soft, mask, plain = (
        self_supervision(given, IDS, equal_captions=mode)["image_ssl_loss"] for mode in ("soft", "mask", "plain")
    )
    assert soft == mask == view_loss(*pictures, equal_captions="mask") / 2
    assert plain > mask
    texts = [self_supervision(given, IDS, equal_captions=mode)["text_ssl_loss"] for mode in MODES]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("mode", MODES)
def test_simclr_is_nt_xent(mode):
    """Each of the 2B vectors against all others but itself, at a temperature of its own."""
    first, second = (outputs().features[f"{PROJECTION}{view}"] for view in ("image_aug", "image_aug2"))
    everyone, total = torch.cat([first, second]), 0.0
    for row in range(16):
        partner = (row + 8) % 16
        counted = [
            k for k in range(16)
            if k == partner or (k % 8 != row % 8 and (mode == "plain" or WORDS[k % 8] != WORDS[row % 8]))
        ]  # fmt: skip
        logits = [float(everyone[row] @ everyone[k]) / 0.1 for k in counted]
        total += math.log(sum(map(math.exp, logits))) - logits[counted.index(partner)]
    found = simclr_loss(first, second, 0.1, IDS, equal_captions=mode)
    assert found.item() == pytest.approx(total / 16, rel=1e-4)
    slip = Slip(ssl_weight=0.5, equal_captions=mode)(outputs(), IDS)
    assert slip["simclr_loss"].item() == pytest.approx(total / 32, rel=1e-4)


def test_losses_are_in_full_precision_under_autocast():
    given = outputs(scale=100.0)
    image, text = given.features["image"], given.features["text"]
    expected = {kind: kind()(given, IDS)["loss"] for kind in OBJECTIVES.values()}
    with torch.autocast("cpu", torch.bfloat16):
        for kind, value in expected.items():
            assert torch.equal(kind()(given, IDS)["loss"], value), kind
    half = [values.bfloat16() for values in (image, text)]
    assert clip_loss(*half, given.logit_scale, IDS)["loss"].dtype == torch.float32
    assert siglip_loss(*half, given.logit_scale, given.logit_bias, IDS)["loss"].dtype == torch.float32
