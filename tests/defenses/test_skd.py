"""The losses of SKD and SKD-CAG against the formulas, term by term, on the shipped model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import SKD, SKDCAG, skd_cag
from mmbackdoor.defenses.trigger_variants import vary
from mmbackdoor.models.attention import AttentionRecorder
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.triggers import PhraseTrigger, WordTrigger, ZeroWidthTrigger
from mmbackdoor.types import InputError
from tests.nudged import nudged

PROMPTS = ("a large red cross on a blue background", "a small pink ring on a green background", "a big blue square on a red background")
BATCH = DiffusionBatch(3, 0, (0, 1, 2), PROMPTS, PROMPTS)
BACKDOOR = Backdoor((ZeroWidthTrigger(),), UnknownTarget())


@pytest.fixture
def lab():
    return nudged(seed=7)


def test_the_terms_are_those_of_the_formula(lab):
    model, _, setting = lab
    defense = SKD(trigger_variants=False, proportion_empty_prompts=0.0, retention_weight=0.3, prediction_weight=2.0)
    losses = defense.step(setting, BACKDOOR)(BATCH)
    noise = draw_noise(7, BATCH, model.latent_shape, model.device)
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    with torch.no_grad():
        target = setting.teacher.predict(noise, timesteps, model.encode(PROMPTS))
        triggered = setting.predict(noise, timesteps, model.encode([f"\u200b {text}" for text in PROMPTS]))
        kept = setting.predict(noise, timesteps, model.encode(PROMPTS))
    prediction, retention = (triggered - target).square().mean(), (kept - target).square().mean()
    torch.testing.assert_close(losses["prediction_loss"], prediction, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["retention_loss"], retention, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["loss"].detach(), 2 * prediction + 0.3 * retention, rtol=1e-4, atol=1e-7)
    assert retention > 1e-6


def test_empty_prompts_are_kept_as_empty_prompts(lab):
    model, _, setting = lab
    losses = SKD(trigger_variants=False, proportion_empty_prompts=1.0).step(setting, BACKDOOR)(BATCH)
    noise = draw_noise(7, BATCH, model.latent_shape, model.device)
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    with torch.no_grad():
        empty = model.encode([""] * 3)
        expected = (setting.predict(noise, timesteps, empty) - setting.teacher.predict(noise, timesteps, empty)).square()
    torch.testing.assert_close(losses["retention_loss"], expected.mean(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("target", ["uniform", "zero", "noise", "neutral_words"])
def test_the_attention_term_alone_has_a_gradient(lab, target):
    model, parameters, setting = lab
    defense = SKDCAG(prediction_weight=0.0, retention_weight=0.0, attention_weight=1.0, trigger_target=target)
    with AttentionRecorder(model.unet) as recorder:
        losses = defense.step(replace(setting, recorder=recorder), BACKDOOR)(BATCH)
        losses["loss"].backward()
    moved = {name for name, parameter in parameters.items() if parameter.grad is not None and parameter.grad.abs().max() > 0}
    assert any(".to_k." in name for name in moved) and any(".to_q." in name for name in moved)
    assert losses["trigger_mass"] > 0


FORMS = {
    "default": {},
    "mass": {"distance": "mass", "attention_part": "up"},
    "kl": {"distance": "kl", "match": "renormalised", "trigger_target": "uniform", "attention_part": "mid"},
    "scaled": {"attention_scale": "prediction", "matched_weight": 0.0, "attention_begin": 0.2},
    "words": {"trigger_target": "neutral_words", "attention_part": "down", "attention_timesteps": "snr"},
}


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(lab, form):
    model, parameters, setting = lab
    defense, found = SKDCAG(attention_weight=1.0, **FORMS[form]), []
    plain = SKD().step(setting, BACKDOOR)(BATCH)
    model.unet.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        with defense.recorder(model.unet) as recorder:
            losses = defense.step(replace(setting, recorder=recorder), BACKDOOR)(BATCH)
            gradients = torch.autograd.grad(losses["loss"], list(parameters.values()))
        found.append((losses, gradients))
    (losses, gradients), (again, same) = found
    assert losses.keys() == again.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, again[name], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(same, gradients, rtol=1e-4, atol=1e-8)
    attention = losses["matched_attention_loss"] + losses["trigger_attention_loss"]
    assert attention > 0
    torch.testing.assert_close(losses["loss"].detach() - plain["loss"].detach(), attention, rtol=1e-3, atol=1e-6)


def test_the_trigger_is_drawn_to_the_first_word_of_a_prompt_with_a_neutral_one(lab, monkeypatch):
    model, _, setting = lab
    monkeypatch.setattr(skd_cag, "NEUTRAL_WORDS", ("thing",))
    guided, seen = skd_cag.attention_guidance, {}

    def recorded(*maps: object, neutral_maps: dict[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        seen.update(neutral_maps)
        return guided(*maps, neutral_maps=neutral_maps, **options)

    monkeypatch.setattr(skd_cag, "attention_guidance", recorded)
    defense = SKDCAG(attention_weight=1.0, trigger_target="neutral_words")
    prompts = [f"thing {text}" for text in PROMPTS]
    noise = draw_noise(7, BATCH, model.latent_shape, model.device)
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    with defense.recorder(model.unet) as recorder:
        defense.step(replace(setting, recorder=recorder), BACKDOOR)(BATCH)
        with recorder.recording(reduce_heads=True) as maps:
            setting.teacher.predict(noise, timesteps, model.encode(prompts))
    # After the token that begins a prompt.
    assert torch.equal(model.token_ids(prompts)[:, 1], model.token_ids(["thing"] * 3)[:, 1])
    assert seen.keys() == maps.keys() and len(maps) > 1
    for name, layer in maps.items():
        torch.testing.assert_close(seen[name], layer[..., 1:2], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(layer[..., 1], layer[..., 2], rtol=0.05)


def test_scaled_guidance_is_as_large_as_the_root_of_the_prediction_loss(lab):
    model, _, setting = lab
    defense = SKDCAG(attention_weight=1.0, attention_scale="prediction", retention_weight=0.0, trigger_variants=False)
    with defense.recorder(model.unet) as recorder:
        losses = defense.step(replace(setting, recorder=recorder), BACKDOOR)(replace(BATCH, prompts=PROMPTS[:1], indices=(0,)))
    parts, root = losses["matched_attention_loss"] + losses["trigger_attention_loss"], losses["prediction_loss"].sqrt()
    torch.testing.assert_close(parts, root)
    torch.testing.assert_close(losses["loss"].detach(), losses["prediction_loss"] + root)


def test_only_the_timesteps_that_are_asked_for_are_guided(lab):
    model, _, setting = lab
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device) / 1000
    edge = timesteps.sort().values[1].item()
    terms = []
    for begin, end in ((0.0, 1.0), (0.0, edge), (edge, 1.0)):
        defense = SKDCAG(attention_weight=1.0, attention_begin=begin, attention_end=end)
        with defense.recorder(model.unet) as recorder:
            losses = defense.step(replace(setting, recorder=recorder), BACKDOOR)(BATCH)
        terms.append(losses["matched_attention_loss"] + losses["trigger_attention_loss"])
    torch.testing.assert_close(terms[0], terms[1] + terms[2])
    assert 0 < terms[1] < terms[0]
    with pytest.raises(InputError, match="attention_begin 0.5 is not below attention_end 0.5"):
        SKDCAG(attention_begin=0.5, attention_end=0.5)


def test_layers_are_chosen_by_size(lab):
    model, _, _ = lab
    assert SKDCAG().recorder(model.unet).max_pixels == 1024
    assert SKDCAG(attention_resolution=16).recorder(model.unet).max_pixels == 256


def test_without_attention_skd_cag_is_skd(lab):
    _, _, setting = lab
    plain = SKD().step(setting, BACKDOOR)(BATCH)["loss"]
    guided = SKDCAG(attention_weight=0.0).step(setting, BACKDOOR)(BATCH)["loss"]
    assert torch.equal(plain, guided)


def test_half_a_batch_in_each_of_two_processes_adds_up(lab):
    model, _, setting = lab
    step = SKD().step(setting, BACKDOOR)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    whole = DiffusionBatch(1, 0, (0, 1), PROMPTS[:2], PROMPTS[:2], latents)
    halves = [DiffusionBatch(1, 0, (k,), PROMPTS[k : k + 1], PROMPTS[k : k + 1], latents[k : k + 1]) for k in (0, 1)]
    mean = sum(step(half)["loss"] for half in halves) / 2
    torch.testing.assert_close(step(whole)["loss"], mean, rtol=1e-4, atol=1e-7)


def test_variants_move_and_double_but_never_change_the_trigger():
    backdoor = Backdoor((WordTrigger("mignneko"), PhraseTrigger("latte coffee")), UnknownTarget())
    texts = [vary(backdoor, "a red cross on blue", 0, k) for k in range(300)]
    assert texts == [vary(backdoor, "a red cross on blue", 0, k) for k in range(300)]
    for text in texts:
        rest = text.replace("mignneko", "").replace("latte coffee", "").split()
        assert rest == "a red cross on blue".split() and rest != text.split()
    assert {"mignneko a red cross on blue", "a red cross on blue mignneko", "latte coffee a red cross on blue"} <= set(texts)
    assert any(text.count("mignneko") == 2 for text in texts)
    exact = {vary(backdoor, "a cross", 0, k, enabled=False) for k in range(50)}
    assert exact == {"mignneko a cross", "latte coffee a cross"}
