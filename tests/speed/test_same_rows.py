"""What is compared computes the same: floor and ours have equal losses on equal inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.defenses import SKD, SKDCAG, TextEncoderSeal
from mmbackdoor.models.clip import load_clip
from mmbackdoor.models.clip_encoder import ViewEncoder
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.shipped import shipped
from mmbackdoor.models.trainable import Teacher, trainable
from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.clip_ssl import ClipSsl
from mmbackdoor.objectives.outputs import ClipOutputs
from mmbackdoor.objectives.pretraining import OBJECTIVES
from mmbackdoor.speed import clip_steps, seals, skd_steps
from mmbackdoor.speed.bench import BACKDOOR, Bench
from mmbackdoor.speed.published import Published, pairs
from mmbackdoor.train.batches import Share

BENCH = Bench(batch_size=6)


@pytest.mark.parametrize("trainable_part", ["attn2_kv", "all"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_floor_of_skd_takes_the_same_rows(trainable_part, share):
    defense = SKD(trainable=trainable_part, retention_weight=0.7, prediction_weight=1.3, proportion_empty_prompts=share)
    model, plain = BENCH.model(), BENCH.model()
    floor = skd_steps.Floor(plain, trainable_part, 4, BENCH.train("no"))
    parameters = trainable(model, trainable_part)
    setting = DiffusionSetting(model, model.unet, Teacher(model, parameters), BENCH.seed)
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        for name, value in parameters.items():
            value += 0.02 * torch.randn(value.shape, generator=draws)
            floor.parameters[name].copy_(value)
    batch = next(BENCH.batches(model, Share(BENCH.batch_size)))
    rows = skd_steps.Rows.of(defense, setting, BACKDOOR, batch)
    ours, theirs = defense.step(setting, BACKDOOR)(batch)["loss"], floor.loss(rows)
    assert ours > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    both = ((ours, parameters), (theirs, floor.parameters))
    gradients = [torch.autograd.grad(loss, list(of.values())) for loss, of in both]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    empty = rows.teacher_latents.shape[0] - BENCH.batch_size
    assert rows.latents.shape[0] == 12 and (empty == round(6 * share) if share in (0, 1) else 0 < empty < 6)


def test_a_tenth_of_the_retention_rows_has_the_empty_prompt_unless_said():
    bench = replace(BENCH, batch_size=8)
    assert bench.removal(SKD).proportion_empty_prompts == 0.1 and bench.removal(SKDCAG).trainable == "attn2_kv"
    assert replace(bench, proportion_empty_prompts=0.5).removal(SKDCAG).proportion_empty_prompts == 0.5
    model = bench.model()
    setting = DiffusionSetting(model, model.unet, None, bench.seed)
    batches = bench.batches(model, Share(8))
    rows = [skd_steps.Rows.of(bench.removal(SKD), setting, BACKDOOR, next(batches)) for _ in range(24)]
    share = sum(len(one.teacher_latents) - 8 for one in rows) / (8 * len(rows))
    assert 0.05 < share < 0.16


def test_ours_and_the_floor_take_the_same_steps():
    """Three whole optimiser steps: the floor's losses are those of the loop, but for the clipping of gradients."""
    bench = replace(BENCH, batch_size=2, trainable="attn2_kv")
    defense = SKD(trainable="attn2_kv")
    floor = skd_steps.floor(bench, "no", defense)
    losses, weights = [], skd_steps.removals(bench, bench.model(), bench.accelerator("no"), "no", {"skd": defense})
    for _ in range(3):
        losses.append((weights["skd"].act()[1]["loss"], floor.act()))
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("objective", [Clip(), ClipSsl()], ids=lambda one: one.name)
def test_the_floor_of_clip_has_its_loss(objective):
    clip = load_clip(shipped("tiny_judge"))
    batch = clip_steps.invented(clip, objective.views, 5, 0, torch.device("cpu"))
    floor = clip_steps.Floor(clip_steps.Bare(clip.network).train(), None, "no")
    ours = objective(ClipOutputs(*ViewEncoder(clip.network).train()(batch.images, batch.texts)), batch.captions)
    assert set(batch.images) | set(batch.texts) == set(objective.views)
    torch.testing.assert_close(ours["loss"], floor.loss(batch), rtol=1e-5, atol=1e-6)
    assert ours["false_negatives"] == 0 and objective.name in OBJECTIVES


def test_the_floor_of_the_text_seal_has_its_loss():
    defense, bench = TextEncoderSeal(), replace(BENCH, batch_size=3)
    ours, theirs = bench.model(), bench.model()
    batches = [batch for batch, _ in zip(bench.batches(theirs, Share(3)), range(2), strict=False)]
    floor = seals.text_floor(bench, theirs, batches, defense)
    step = seals.text_seal(bench, ours, defense)
    for _ in range(2):
        assert step.act()[1]["loss"] == pytest.approx(floor.act(), rel=1e-4, abs=1e-7)


def test_the_plain_published_procedure_trains_by_its_prediction_alone():
    """Its attention term is a constant, as in the published code: the weights move as without it."""
    moved = []
    for attention in (True, False):
        model = BENCH.model()
        procedure = Published(model, 0, 1e-3)
        if not attention:
            procedure._attention_error = lambda *_: torch.zeros(())
        losses = [procedure.step(*pair) for pair, _ in zip(pairs(BENCH.prompts(), 0), range(2), strict=False)]
        moved.append((losses, model.unet.state_dict()))
    (with_it, weights), (without, same) = moved
    assert all(one > other + 0.01 for one, other in zip(with_it, without, strict=True))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    start = BENCH.model().unet.state_dict()
    assert any(not torch.equal(weights[name], start[name]) for name in weights)


def test_no_removal_finds_its_prompts_read_by_another(monkeypatch):
    model, read = BENCH.model(), []
    encode = model._encode
    monkeypatch.setattr(model, "_encode", lambda prompts: read.append(set(prompts)) or encode(prompts))
    timed = skd_steps.removals(BENCH, model, BENCH.accelerator("no"), "no", {"skd": SKD(), "skd_cag": SKDCAG()})
    for name in ("skd", "skd_cag"):
        with timed[name].around():
            timed[name].act()
    first, second = read
    assert first == second and len(first) >= BENCH.batch_size


def test_guidance_records_only_where_it_is_timed():
    model = BENCH.model()
    timed = skd_steps.removals(
        replace(BENCH, batch_size=1), model, BENCH.accelerator("no"), "no", {"skd": SKD(), "skd_cag": SKDCAG()}
    )
    before = dict(model.unet.attn_processors)
    for name in ("skd", "skd_cag", "skd_cag", "skd"):
        with timed[name].around():
            metrics = timed[name].act()[1]
            assert ("trigger_mass" in metrics) == (name == "skd_cag")
        assert model.unet.attn_processors == before
