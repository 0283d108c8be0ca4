"""The text encoders as what is trained: they give what the pipeline gives, and are saved in the form that came in."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load, save, trained_tensors
from mmbackdoor.models.text_training import TextTeacher, trainable_text
from mmbackdoor.types import InputError

PROMPTS = ["a red square", "", "a photo of a very large green ring on a small blue background in front of a star"]
FAMILIES = ["sd", "sd2", "sdxl"]


def change(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))


def outputs(model: DiffusionModel) -> list[torch.Tensor]:
    conditioning = model.encode(PROMPTS)
    return [conditioning.hidden_states, *(value for name, value in conditioning.added.items() if name != "time_ids")]


def changed(before, after) -> set[str]:
    old, new = load_file(before), load_file(after)
    assert old.keys() == new.keys() and all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_pipelines_and_has_a_gradient(folders, family):
    model = load(folders(family))
    expected = outputs(model)
    encoders, parameters = trainable_text(model, "all")
    found = encoders(PROMPTS)
    assert len(found) == len(expected) == (2 if family == "sdxl" else 1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(one.requires_grad for one in found)
    assert not any(value.requires_grad for value in (*model.unet.parameters(), *model.vae.parameters()))
    gradients = torch.autograd.grad(sum(one.square().sum() for one in found), list(parameters.values()))
    assert len(gradients) == len(parameters)


def test_what_no_picture_depends_on_is_not_trained(folders):
    model = load(folders("sdxl"))
    _, parameters = trainable_text(model, "all")
    last = model.pipe.text_encoder.config.num_hidden_layers - 1
    assert not any(name.startswith(f"text_encoder.encoder.layers.{last}.") for name in parameters)
    assert any(f"layers.{last}." in name for name in parameters if name.startswith("text_encoder_2."))
    assert "text_encoder_2.text_projection.weight" in parameters
    assert {name for name, value in model.pipe.text_encoder.named_parameters() if value.requires_grad} == {
        name.removeprefix("text_encoder.") for name in parameters if name.startswith("text_encoder.")
    }


@pytest.mark.parametrize("subset", ["all", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_stays_what_the_encoders_were(folders, subset, checkpointing):
    model = load(folders("sd"))
    start = outputs(model)[0]
    encoders, parameters = trainable_text(model, subset, 3, checkpointing)
    teacher = TextTeacher(encoders, parameters)
    change(parameters)
    student = encoders(PROMPTS)[0]
    assert torch.equal(teacher.encode(PROMPTS)[0], start) and (student - start).abs().max() > 0.01
    student.square().sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subset", ["all", "lora"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_folder_changes_in_the_trained_tensors_alone(folders, tmp_path, family, subset, dtype):
    source = folders(family, dtype)
    model = load(source)
    _, parameters = trainable_text(model, subset, 2)
    change(parameters)
    save(model, tmp_path / "out")
    model.forget_prompts()
    again = load(tmp_path / "out")
    for one, other in zip(outputs(again), outputs(model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    names = set()
    for file in sorted(source.rglob("*.safetensors")):
        place = file.relative_to(source)
        part = place.parts[0]
        names |= {f"{part}.{name.removeprefix('text_model.')}" for name in changed(file, tmp_path / "out" / place)}
    assert names == {name.replace(".text_model.", ".") for name in trained_tensors(model)}
    assert names and all(name.startswith("text_encoder") for name in names)


def test_a_folder_with_older_names_keeps_them(folders, tmp_path):
    save(load(folders("sd")), tmp_path / "in")
    file = tmp_path / "in/text_encoder/model.safetensors"
    save_file({f"text_model.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    model = load(tmp_path / "in")
    change(trainable_text(model, "lora", 2)[1])
    save(model, tmp_path / "out")
    names = changed(file, tmp_path / "out/text_encoder/model.safetensors")
    assert names and all(name.startswith("text_model.encoder.layers.") for name in names)


@pytest.mark.parametrize("subset", ["all", "lora"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_one_file_checkpoint_changes_in_its_text_part_alone(build, folders, original_file, tmp_path, family, subset):
    file = original_file(build(family), tmp_path / "model.safetensors")
    model = load(file, config=folders(family))
    change(trainable_text(model, subset, 2)[1])
    saved = save(model, tmp_path / "out")
    model.forget_prompts()
    names = changed(file, saved)
    assert names and all(name.startswith(("cond_stage_model.", "conditioner.embedders.")) for name in names)
    for one, other in zip(outputs(load(saved, config=folders(family))), outputs(model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("subset", ["all", "lora"])
def test_a_pipeline_built_in_memory_is_saved_whole(build, tmp_path, subset):
    model = DiffusionModel(build("sd"))
    change(trainable_text(model, subset, 2)[1])
    save(model, tmp_path / "out")
    torch.testing.assert_close(outputs(load(tmp_path / "out"))[0], outputs(model)[0], rtol=0, atol=1e-5)
    assert not list((tmp_path / "out").rglob("adapter_*"))


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_the_text_part_of_a_lora_file_is_trained_in_it(folders, lora_file, tmp_path, kind):
    file = lora_file("sd", tmp_path / "lora", kind)
    model = load(folders("sd"), lora=file)
    change(trainable_text(model, "all")[1])
    saved = save(model, tmp_path / "out")
    model.forget_prompts()
    names = changed(file, saved)
    assert names and all("lora_te" in name or "text_encoder" in name for name in names)
    torch.testing.assert_close(outputs(load(folders("sd"), lora=saved))[0], outputs(model)[0], rtol=0, atol=1e-5)


def test_a_lora_without_a_text_part_is_refused(folders, lora_file, tmp_path):
    file = lora_file("sd", tmp_path / "lora", "diffusers")
    save_file({name: value for name, value in load_file(file).items() if name.startswith("unet.")}, file)
    with pytest.raises(InputError, match="no part in a text encoder"):
        trainable_text(load(folders("sd"), lora=file), "lora")
