"""Removals for CLIP in parts: what they look at, what they change at the start, what their losses are."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from mmbackdoor.defenses.clip import (
    CLIP_DEFENSES,
    CleanClip,
    ClipFinetune,
    DistillAnchor,
    Par,
    ResetDistill,
    ShrinkPerturb,
)
from mmbackdoor.models.clip import build_tiny_clip
from mmbackdoor.models.clip_encoder import ViewEncoder
from mmbackdoor.models.clip_init import initial_parameters
from mmbackdoor.models.clip_setting import ClipSetting
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.objectives.anchor import feature_distance, similarity_distillation
from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.objectives.outputs import ClipOutputs
from mmbackdoor.types import InputError

CAPTIONS = ["a red cross", "a blue ring", "a green square", "a pink heart", "a red ring", "a blue cross"]


@dataclass(frozen=True)
class Batch:
    step: int
    keys: tuple[str, ...]
    images: dict[str, torch.Tensor]
    texts: dict[str, torch.Tensor]
    captions: torch.Tensor


@pytest.fixture(scope="module")
def clip():
    return build_tiny_clip("clip_tiny_vit", train_tokenizer(CAPTIONS, 514))


@pytest.fixture(scope="module")
def batch(clip):
    generator = torch.Generator().manual_seed(0)
    images = {view: torch.randn(6, 3, 32, 32, generator=generator) for view in ("image", "image_aug")}
    texts = {"text": clip.tokenize(CAPTIONS), "text_aug": clip.tokenize(CAPTIONS[::-1])}
    return Batch(0, tuple("abcdef"), images, texts, caption_ids(CAPTIONS))


def setting_of(clip, anchor: bool = True) -> ClipSetting:
    frozen = ViewEncoder(deepcopy(clip.network)).eval().requires_grad_(False) if anchor else None
    return ClipSetting(clip, ViewEncoder(clip.network), frozen)


@pytest.mark.parametrize("name", CLIP_DEFENSES)
def test_a_step_needs_the_views_it_names_and_reaches_every_parameter(name, clip, batch):
    method = CLIP_DEFENSES[name]()
    copy = deepcopy(clip)
    setting = setting_of(copy, method.needs_anchor)
    method.edit(copy, seed=0)
    seen = Batch(0, batch.keys, {v: x for v, x in batch.images.items() if v in method.views},
                 {v: x for v, x in batch.texts.items() if v in method.views}, batch.captions)  # fmt: skip
    losses = method.step(setting)(seen)
    parts = [value for key, value in losses.items() if key.endswith("_loss")]
    assert torch.allclose(sum(parts), losses["loss"]) and "false_negatives" in losses
    losses["loss"].backward()
    missing = [key for key, value in copy.network.named_parameters() if value.grad is None]
    assert not missing, "with several processes every parameter has to take part"
    assert setting.anchor is None or all(value.grad is None for value in setting.anchor.parameters())


def test_the_loss_of_cleanclip_is_that_of_the_weights(clip, batch):
    def loss(**weights: float) -> float:
        return CleanClip(**weights).step(setting_of(clip, False))(batch)["loss"].item()

    both, clip_alone, ssl_alone = loss(), loss(ssl_weight=0.0), loss(clip_weight=0.0)
    assert both == pytest.approx(clip_alone + ssl_alone, rel=1e-5)
    assert CLIP_DEFENSES["ssl_only"]().step(setting_of(clip, False))(batch)["loss"].item() == pytest.approx(ssl_alone)
    assert ClipFinetune().step(setting_of(clip, False))(batch)["loss"].item() == pytest.approx(clip_alone, rel=1e-5)
    with pytest.raises(InputError, match="nothing to learn"):
        CleanClip(clip_weight=0.0, ssl_weight=0.0)


def test_finetuning_with_augmentation_looks_at_the_augmented_picture(clip, batch):
    assert ClipFinetune().views == ("image", "text")
    method = ClipFinetune(augmentation="strong")
    assert method.views == ("image_aug", "text")
    swapped = Batch(0, batch.keys, {"image": batch.images["image_aug"]}, batch.texts, batch.captions)
    plain, augmented = (one.step(setting_of(clip, False))(b)["loss"] for one, b in ((ClipFinetune(), swapped), (method, batch)))
    assert torch.equal(plain, augmented)


def test_par_pushes_away_until_the_threshold(clip, batch):
    copy = deepcopy(clip)
    setting = setting_of(copy)
    with torch.no_grad():
        for parameter in copy.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    losses = Par(augmentation="none").step(setting)(batch)
    distance = losses["distance_image"].item()
    assert 0 < distance < 2.15
    assert losses["perturb_image_loss"].item() == pytest.approx(-0.5 * distance)
    with torch.no_grad():
        now, then = (one.network.encode_text(batch.texts["text"], normalize=True) for one in (copy, clip))
    text = (2 - 2 * (now * then).sum(1)).mean().item()
    assert losses["distance_text"].item() == pytest.approx(text, rel=1e-3)
    assert losses["perturb_text_loss"].item() == pytest.approx(-0.5 * text, rel=1e-3)
    # Each modality has its own switch.
    between = Par(augmentation="none", threshold=(distance + text) / 2).step(setting)(batch)
    switched = [between[f"perturb_{name}_loss"].item() != 0 for name in ("image", "text")]
    assert switched == [distance < text, text < distance]
    reached = Par(augmentation="none", threshold=distance / 2).step(setting)(batch)
    assert reached["perturb_image_loss"].item() == 0
    losses["perturb_image_loss"].backward()
    step = {name: p.grad.clone() for name, p in copy.network.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, parameter in copy.network.named_parameters():
            parameter.sub_(1e-3 * step.get(name, torch.zeros_like(parameter)))
    assert Par(augmentation="none").step(setting)(batch)["distance_image"].item() > distance


def test_the_anchor_sees_the_picture_as_it_is_and_the_model_the_augmented_one(clip, batch):
    copy = deepcopy(clip)
    setting = setting_of(copy)
    with torch.no_grad():
        for parameter in copy.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    losses = DistillAnchor(anchor_weight=0.3).step(setting)(batch)

    def logits(model, view: str) -> torch.Tensor:
        network = model.network
        pictures = network.encode_image(batch.images[view], normalize=True)
        return network.logit_scale.exp() * pictures @ network.encode_text(batch.texts["text"], normalize=True).T

    with torch.no_grad():
        own, target, plain = logits(copy, "image_aug"), logits(clip, "image"), logits(copy, "image")
    # The captions of the batch are all different, so each row's own column is the one that it is told.
    told = sum(F.cross_entropy(rows, torch.arange(6)) for rows in (plain, plain.T)) / 2
    distilled = sum(-(theirs.softmax(1) * ours.log_softmax(1)).sum(1).mean() for ours, theirs in
                    ((own, target), (own.T, target.T))) / 2  # fmt: skip
    assert losses["clip_loss"].item() == pytest.approx(told.item(), rel=1e-4)
    assert losses["distill_loss"].item() == pytest.approx(0.3 * distilled.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(told.item() + 0.3 * distilled.item(), rel=1e-4)


def test_shrinking_is_a_fixed_mixture_with_a_fresh_draw(clip):
    fresh = initial_parameters(clip, seed=3)
    state = torch.random.get_rng_state()
    copies = [deepcopy(clip) for _ in range(3)]
    for copy, seed in zip(copies, (3, 3, 4), strict=True):
        ShrinkPerturb(keep=0.7, noise=0.2).edit(copy, seed)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    for name, before in clip.network.named_parameters():
        after = dict(copies[0].network.named_parameters())[name]
        expected = before if name == "logit_scale" else 0.7 * before + 0.2 * fresh[name]
        assert torch.allclose(after, expected, atol=1e-6), name
    one, same, other = (copy.network.transformer.resblocks[0].mlp.c_fc.weight for copy in copies)
    assert torch.equal(one, same) and not torch.equal(one, other)
    whole = deepcopy(clip)
    ResetDistill(keep=1.0).edit(whole, 0)
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), clip.network.parameters(), strict=True))


def test_a_model_that_has_not_moved_is_at_no_distance(clip, batch):
    setting = setting_of(clip)
    method = ResetDistill()
    same = Batch(0, batch.keys, {"image": batch.images["image"], "image_aug": batch.images["image"]}, batch.texts,
                 batch.captions)  # fmt: skip
    losses = method.step(setting)(same)
    assert all(losses[f"distill_{view}_loss"].item() < 1e-10 for view in method.views)
    assert method.step(setting)(batch)["distill_image_aug_loss"].item() > 1e-4


def test_distances_and_distillation_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(4))
    assert feature_distance(a, b).item() == pytest.approx((2 - 2 * (a * b).sum(1)).mean().item(), rel=1e-5)
    student = ClipOutputs({"image": a, "text": b}, torch.tensor(10.0))
    teacher = ClipOutputs({"image": c, "text": d}, torch.tensor(20.0))
    expected = 0.0
    for transpose in (False, True):
        own, target = 10 * a @ b.T, 20 * c @ d.T
        own, target = (own.T, target.T) if transpose else (own, target)
        expected += -(target.softmax(1) * own.log_softmax(1)).sum(1).mean().item() / 2
    assert similarity_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_a_setting_without_anchor_says_so(clip, batch):
    with pytest.raises(ValueError, match="needs_anchor"):
        setting_of(clip, False).anchored(batch, ("image",))
