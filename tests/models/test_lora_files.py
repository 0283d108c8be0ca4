from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmbackdoor.models.diffusion_files import load, save
from mmbackdoor.models.lora_files import FILE_NAME
from mmbackdoor.models.trainable import Teacher, trainable
from mmbackdoor.types import InputError


def inputs(model):
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([3, 700]), model.encode(["a red square", "x"])


def stock(folder, file):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipe


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_lora_on_its_base_is_loaded_trained_and_saved(folders, lora_file, tmp_path, family, kind):
    file = lora_file(family, tmp_path / "lora", kind, torch.float16)
    model = load(folders(family), lora=file if kind == "kohya" else file.parent)
    assert model.origin == "lora"
    pipe = stock(folders(family), file)
    batch = inputs(model)
    with torch.no_grad():
        initial = model.predict(model.unet, *batch)
        torch.testing.assert_close(initial, model.predict(pipe.unet, *batch), rtol=0, atol=1e-5)
        plain = load(folders(family))
        assert (initial - plain.predict(plain.unet, *batch)).abs().max() > 0.01
    embeddings = pipe.encode_prompt(
        ["a red square", "x"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    torch.testing.assert_close(batch[2].hidden_states, embeddings, rtol=0, atol=1e-5)

    parameters = trainable(model, "attn2_kv")
    assert parameters and all(".attn2.to_" in name and ".lora_" in name for name in parameters)
    teacher = Teacher(model, parameters)
    with torch.no_grad():
        for value in parameters.values():
            value.add_(0.5)
        assert torch.equal(teacher.predict(*batch), initial)
        assert (model.predict(model.unet, *batch) - initial).abs().max() > 0.01
    written = save(model, tmp_path / "out")
    assert written == tmp_path / "out" / FILE_NAME
    old, new = load_file(file), load_file(written)
    assert list(old) == list(new) and {value.dtype for value in new.values()} == {torch.float16}
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        model.files.stored[n] for n in parameters
    }
    with safe_open(file, "pt") as before, safe_open(written, "pt") as after:
        assert before.metadata() == after.metadata()
    with torch.no_grad():
        trained = model.predict(model.unet, *batch)
        again = model.predict(stock(folders(family), written).unet, *batch)
    torch.testing.assert_close(again, trained, rtol=0, atol=0.01)


def test_all_of_a_lora_is_its_unet_part(folders, lora_file, tmp_path):
    model = load(folders("sd"), lora=lora_file("sd", tmp_path, "diffusers"))
    names = set(model.files.stored)
    assert set(trainable(model, "lora")) == set(trainable(model, "all")) == names
    assert not any(value.requires_grad for value in model.pipe.text_encoder.parameters())


def test_a_lora_in_half_precision(folders, lora_file, tmp_path):
    model = load(folders("sd"), lora=lora_file("sd", tmp_path, "diffusers"), dtype=torch.bfloat16)
    assert model.unet.conv_in.weight.dtype == model.dtype == torch.bfloat16
    assert {value.dtype for value in trainable(model, "lora").values()} == {torch.float32}


class TestBadInput:
    def test_missing_pickled_and_other_files(self, folders, tmp_path):
        with pytest.raises(InputError, match="no file, nor a folder"):
            load(folders("sd"), lora=tmp_path)
        (tmp_path / "lora.pt").touch()
        with pytest.raises(InputError, match="pickled"):
            load(folders("sd"), lora=tmp_path / "lora.pt")
        save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="holds the tensor 'x'"):
            load(folders("sd"), lora=tmp_path / "x.safetensors")

    def test_a_lora_for_another_base(self, folders, lora_file, tmp_path):
        with pytest.raises(InputError, match="kohya.safetensors"):
            load(folders("sd"), lora=lora_file("sdxl", tmp_path / "xl", "kohya"))

    def test_text_encoder_only_and_nan(self, folders, lora_file, tmp_path):
        file = lora_file("sd", tmp_path, "diffusers")
        state = load_file(file)
        text = {name: value for name, value in state.items() if name.startswith("text_encoder")}
        save_file(text, tmp_path / "text.safetensors")
        with pytest.raises(InputError, match="changes no UNet layer"):
            load(folders("sd"), lora=tmp_path / "text.safetensors")
        name = next(iter(state))
        save_file({**state, name: torch.full_like(state[name], float("nan"))}, tmp_path / "nan.safetensors")
        with pytest.raises(InputError, match="NaN"):
            load(folders("sd"), lora=tmp_path / "nan.safetensors")

    def test_a_missing_half_of_a_factor(self, folders, lora_file, tmp_path):
        file = lora_file("sd", tmp_path / "whole", "kohya")
        state = load_file(file)
        state.pop(next(name for name in state if "lora_up" in name and "unet" in name))
        shutil.rmtree(tmp_path / "whole")
        save_file(state, tmp_path / "half.safetensors")
        with pytest.raises(InputError, match="half.safetensors"):
            load(folders("sd"), lora=tmp_path / "half.safetensors")
