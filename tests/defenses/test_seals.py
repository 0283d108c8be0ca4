"""ESD and the two seals against their formulas, and what they cannot do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import ESD, SKD, ClosedFormSeal, TextEncoderSeal
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import shipped
from mmbackdoor.models.text_training import TextSetting, TextTeacher, trainable_text
from mmbackdoor.models.token_pairs import token_pairs
from mmbackdoor.models.trainable import Teacher, replace_weights, text_projections, trainable
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.triggers import WordTrigger, ZeroWidthTrigger
from mmbackdoor.types import InputError

PROMPTS = ("a large red cross on a blue background", "a small pink ring on a green background")
BATCH = DiffusionBatch(3, 0, (0, 1), PROMPTS, PROMPTS)
BACKDOOR = Backdoor((ZeroWidthTrigger(),), UnknownTarget())
MARKED = [f"\u200b {text}" for text in PROMPTS]


def nudge(parameters, size: float) -> None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def check_slope(loss_of, parameters) -> None:
    """The gradient against a finite difference along a random direction."""
    generator = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(value.shape, generator=generator) for name, value in parameters.items()}
    gradients = torch.autograd.grad(loss_of(), list(parameters.values()))
    slope = sum((one * direction).sum() for one, direction in zip(gradients, directions.values(), strict=True))
    step, ends = 1e-3, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += sign * step * directions[name]
            ends.append(loss_of().item())
    assert slope.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.03)
    assert abs(slope.item()) > 1e-4


@pytest.fixture
def unet_lab():
    model = load(shipped("tiny"))
    parameters = trainable(model, "attn2")
    teacher = Teacher(model, parameters)
    nudge(parameters, 0.02)
    return model, parameters, DiffusionSetting(model, model.unet, teacher, seed=7)


def test_esd_aims_past_the_clean_prediction(unet_lab):
    model, parameters, setting = unet_lab
    defense = ESD(negative_guidance=1.5, retention_weight=0.4, trigger_variants=False, proportion_empty_prompts=1.0)
    losses = defense.step(setting, BACKDOOR)(BATCH)
    noise = draw_noise(7, BATCH, model.latent_shape, model.device)
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    inputs = noise, timesteps
    with torch.no_grad():
        clean = setting.teacher.predict(*inputs, model.encode(PROMPTS))
        triggered = setting.teacher.predict(*inputs, model.encode(MARKED))
        target = clean - 1.5 * (triggered - clean)
        prediction = (setting.predict(*inputs, model.encode(MARKED)) - target).square().mean()
        empty = model.encode(["", ""])
        retention = (setting.predict(*inputs, empty) - setting.teacher.predict(*inputs, empty)).square().mean()
    assert (triggered - clean).abs().max() > 1e-3
    torch.testing.assert_close(losses["prediction_loss"], prediction, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["retention_loss"], retention, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["loss"].detach(), prediction + 0.4 * retention, rtol=1e-4, atol=1e-7)
    check_slope(lambda: defense.step(setting, BACKDOOR)(BATCH)["loss"], parameters)


def test_esd_without_guidance_is_skd(unet_lab):
    _, _, setting = unet_lab
    expected = SKD(retention_weight=0.0).step(setting, BACKDOOR)(BATCH)["loss"]
    found = ESD(negative_guidance=0.0).step(setting, BACKDOOR)(BATCH)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_text_encoder_seal_compares_with_the_clean_text(folders, family, distance):
    model = load(folders(family))
    encoders, parameters = trainable_text(model, "all")
    setting = TextSetting(encoders, TextTeacher(encoders, parameters), seed=7)
    nudge(parameters, 0.05)
    defense = TextEncoderSeal(distance=distance, seal_weight=2.0, trigger_variants=False, proportion_empty_prompts=0.0)
    backdoor = Backdoor((WordTrigger("small"),), UnknownTarget())
    losses = defense.step(setting, backdoor)(BATCH)
    with torch.no_grad():
        seal = retention = 0.0
        for clean, marked, kept in zip(
            setting.teacher.encode(PROMPTS),
            encoders([f"small {text}" for text in PROMPTS]),
            encoders(PROMPTS),
            strict=True,
        ):
            apart = [(one - clean).square() for one in (marked, kept)]
            if distance == "cosine":
                apart = [1 - torch.cosine_similarity(one, clean, dim=-1) for one in (marked, kept)]
            seal, retention = seal + apart[0].mean(), retention + apart[1].mean()
    torch.testing.assert_close(losses["seal_loss"], seal, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["retention_loss"], retention, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"].detach(), 2 * seal + retention, rtol=1e-4, atol=1e-6)
    check_slope(lambda: defense.step(setting, backdoor)(BATCH)["loss"], parameters)


def test_the_closed_form_solves_its_normal_equations_for_every_projection():
    model = load(shipped("tiny"))
    defense = ClosedFormSeal(ridge=0.3, trigger_variants=False)
    weights = {name: value.double() for name, value in text_projections(model).items()}
    edited = defense.edit(model, BACKDOOR, PROMPTS)
    assert edited.keys() == weights.keys() and len(edited) == 8
    clean, marked = (model.encode(texts).hidden_states.double() for texts in (PROMPTS, MARKED))
    places = torch.tensor(token_pairs(model, PROMPTS, MARKED))[..., None]
    wanted, marked = clean.take_along_dim(places, 1).flatten(0, 1), marked.flatten(0, 1)
    kept = model.encode(["", *PROMPTS]).hidden_states.double().flatten(0, 1)
    for name, weight in weights.items():
        found = edited[name].double()
        gradient = (
            (marked @ found.T - wanted @ weight.T).T @ marked
            + (kept @ found.T - kept @ weight.T).T @ kept
            + 0.3 * (found - weight)
        )
        assert gradient.abs().max() < 1e-4 * (marked.T @ marked).abs().max()
        # Weights are float32: solved in it, too, the gradient would be a thousand times this.
        assert not torch.equal(edited[name], text_projections(model)[name])


def test_a_single_prompt_is_sealed_and_what_is_kept_stays():
    """24 tokens and their paddings in 64 dimensions: an exact fit exists, and cross-attention sees no order."""
    model = load(shipped("tiny"))
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = latents, torch.tensor([600])
    prompt, marked = PROMPTS[0], MARKED[0]
    with torch.no_grad():
        before = [model.predict(model.unet, *inputs, model.encode([text])) for text in (prompt, marked)]
        replace_weights(model, ClosedFormSeal(ridge=1e-4, trigger_variants=False).edit(model, BACKDOOR, [prompt]))
        after = [model.predict(model.unet, *inputs, model.encode([text])) for text in (prompt, marked)]
    apart = (before[1] - before[0]).square().mean()
    assert (after[1] - before[0]).square().mean() < 0.02 * apart
    assert (after[0] - before[0]).square().mean() < 0.02 * apart


def test_the_closed_form_needs_weights_that_it_can_write(folders, lora_file, tmp_path):
    model = load(folders("sd"), lora=lora_file("sd", tmp_path, "diffusers"))
    with pytest.raises(InputError, match="merge it into its base"):
        ClosedFormSeal().edit(model, replace(BACKDOOR, triggers=(WordTrigger("small"),)), PROMPTS)


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl"])
def test_the_closed_form_changes_all_projections_of_every_family(folders, family):
    model = load(folders(family))
    backdoor = Backdoor((WordTrigger("small"),), UnknownTarget())
    edited = ClosedFormSeal().edit(model, backdoor, ["a red square", "a ring"])
    ends = (".attn2.to_k.weight", ".attn2.to_v.weight")
    names = {name for name, _ in model.unet.named_parameters() if name.endswith(ends)}
    assert edited.keys() == names and all(torch.isfinite(value).all() for value in edited.values())
