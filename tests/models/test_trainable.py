from __future__ import annotations

import pytest
import torch

from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.trainable import Teacher, trainable
from mmbackdoor.types import InputError

SUBSETS = ["attn2_kv", "attn2", "all", "lora"]


def batch(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape, generator=generator)
    return latents, torch.tensor([100, 800]), model.encode(["a red square", ""])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_subsets_hold_what_their_names_say_and_freeze_the_rest(folders, family):
    model = load(folders(family))
    layers = 2 + 1 if family == "sd" else 2 + 2 * 3
    kv = trainable(model, "attn2_kv")
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in kv)
    assert len(kv) % 2 == 0 and len(kv) >= 2 * layers
    attn2 = trainable(model, "attn2")
    assert set(kv) < set(attn2) and all(".attn2." in name for name in attn2)
    everything = trainable(model, "all")
    assert set(everything) == {name for name, _ in model.unet.named_parameters()}
    trainable(model, "attn2_kv")
    assert {name for name, value in model.unet.named_parameters() if value.requires_grad} == set(kv)
    assert not any(value.requires_grad for part in (model.vae, model.pipe.text_encoder) for value in part.parameters())


def test_lora_trains_adapters_only_and_changes_nothing_at_first(folders):
    model = load(folders("sd"))
    before = model.predict(model.unet, *batch(model))
    parameters = trainable(model, "lora", rank=3)
    assert torch.equal(model.predict(model.unet, *batch(model)), before)
    assert all(3 in value.shape and ".lora_" in name for name, value in parameters.items())
    assert {name for name, value in model.unet.named_parameters() if value.requires_grad} == set(parameters)
    with pytest.raises(InputError, match="rank 0"):
        trainable(load(folders("sd")), "lora", rank=0)


def test_half_precision_weights_are_trained_in_float32(folders):
    model = load(folders("sd"), dtype=torch.bfloat16)
    parameters = trainable(model, "attn2_kv")
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    assert model.unet.conv_in.weight.dtype == torch.bfloat16


def test_an_unknown_subset_is_an_error(folders):
    with pytest.raises(InputError, match="'attn1' is none of attn2_kv, attn2, all, lora"):
        trainable(load(folders("sd")), "attn1")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
def test_the_teacher_stays_what_the_model_was(folders, subset, bf16, checkpointing):
    """Student and teacher in one autocast context, in both orders, before and after a large step."""
    model = load(folders("sd"))
    inputs = batch(model)
    parameters = trainable(model, subset)
    teacher = Teacher(model, parameters)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), torch.no_grad():
        initial = model.predict(model.unet, *inputs)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            first = teacher.predict(*inputs)
            student = model.predict(model.unet, *inputs)
            second = teacher.predict(*inputs)
        assert torch.equal(first, initial) and torch.equal(second, initial)
        assert not first.requires_grad and student.requires_grad
        loss = torch.nn.functional.mse_loss(student.float(), second.float() + 1)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        assert any(gradient.abs().max() > 0 for gradient in gradients)
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                # Adapters start at zero on one side: a step along the sign moves both sides.
                parameter.add_(gradient.sign() + 0.5, alpha=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), torch.no_grad():
        student = model.predict(model.unet, *inputs)
        assert (student - initial).abs().max() > 0.05
        assert torch.equal(teacher.predict(*inputs), initial)
        assert torch.equal(model.predict(model.unet, *inputs), student)


def test_gradients_are_the_same_with_a_teacher_call_in_between(folders):
    model = load(folders("sd"))
    inputs = batch(model)
    parameters = trainable(model, "attn2_kv")
    teacher = Teacher(model, parameters)
    with torch.no_grad():
        for value in parameters.values():
            value.mul_(3)
    model.unet.enable_gradient_checkpointing()
    model.unet.train()
    results = []
    for between in (False, True):
        loss = model.predict(model.unet, *inputs).square().mean()
        if between:
            teacher.predict(*inputs)
        results.append(torch.autograd.grad(loss, list(parameters.values())))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_teacher_holds_the_trained_tensors_only(folders):
    model = load(folders("sd"))
    parameters = trainable(model, "attn2_kv")
    teacher = Teacher(model, parameters)
    assert set(teacher.originals) == set(parameters)
    assert all(torch.equal(teacher.originals[name], value) for name, value in parameters.items())
