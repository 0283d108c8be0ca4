from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmbackdoor.models import architectures
from mmbackdoor.models.architectures import config_folder
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load, save
from mmbackdoor.models.single_file import SingleFile, find_single_file
from mmbackdoor.models.trainable import trainable
from mmbackdoor.types import InputError


def change(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_file_in_and_out_changes_the_trained_tensors_only(build, folders, original_file, tmp_path, family, dtype):
    pipe = build(family).to(dtype=dtype)
    file = original_file(pipe, tmp_path / "one.safetensors")
    model = load(file, config=folders(family))
    assert model.origin == "single_file"
    reference = load(folders(family, dtype))
    assert all(torch.equal(value, model.unet.state_dict()[name]) for name, value in reference.unet.state_dict().items())
    torch.testing.assert_close(model.encode(["a red"]).hidden_states, reference.encode(["a red"]).hidden_states)
    parameters = trainable(model, "attn2_kv")
    change(parameters)
    written = save(model, tmp_path / "out")
    assert written == tmp_path / "out" / "one.safetensors"
    old, new = load_file(file), load_file(written)
    assert list(old) == list(new)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {model.files.stored[name] for name in parameters}
    assert all(".attn2.to_" in name for name in changed)
    assert {value.dtype for value in new.values()} == {dtype}
    with safe_open(written, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    again = load(written, config=folders(family))
    for name, value in parameters.items():
        assert torch.equal(again.unet.state_dict()[name], value.detach().to(dtype).float())


def test_stock_diffusers_reads_the_file_back(build, folders, original_file, tmp_path):
    model = load(original_file(build("sd"), tmp_path / "one.safetensors"), config=folders("sd"))
    change(trainable(model, "lora", rank=2))
    written = save(model, tmp_path / "out")
    pipe = StableDiffusionPipeline.from_single_file(
        str(written), config=str(folders("sd")), local_files_only=True, safety_checker=None
    )
    latents = torch.randn(1, 4, 8, 8)
    conditioning = model.encode(["a red square"])
    with torch.no_grad():
        ours, stock = (
            model.predict(unet, latents, torch.tensor([9]), conditioning) for unet in (model.unet, pipe.unet)
        )
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_averaged_copies_of_the_unet_are_left_out(build, folders, original_file, tmp_path):
    file = original_file(build("sd"), tmp_path / "one.safetensors", ema=True)
    model = load(file, config=folders("sd"))
    written = save(model, tmp_path / "out")
    old, new = load_file(file), load_file(written)
    assert any(name.startswith("model_ema.") for name in old)
    assert set(new) == {name for name in old if not name.startswith("model_ema.")}
    assert all(torch.equal(old[name], value) for name, value in new.items())


def test_pickled_files_are_read_only_where_allowed(build, folders, original_file, tmp_path):
    file = original_file(build("sd"), tmp_path / "one.ckpt")
    with pytest.raises(InputError, match="pickled.*--allow_pt_weights"):
        load(file, config=folders("sd"))
    model = load(file, config=folders("sd"), allow_pt_weights=True)
    parameters = trainable(model, "attn2_kv")
    change(parameters)
    written = save(model, tmp_path / "out")
    assert written.name == "one.safetensors"
    again = load(written, config=folders("sd"))
    assert all(torch.equal(again.unet.state_dict()[name], value) for name, value in parameters.items())


def test_the_text_width_chooses_the_packaged_config(tmp_path):
    file = tmp_path / "model.safetensors"
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    for width, architecture in ((768, "sd15"), (2048, "sdxl")):
        save_file({name: torch.zeros(8, width)}, file)
        found = find_single_file(file, None, None, False)
        assert (found.architecture, found.config) == (architecture, config_folder(architecture))
    save_file({name: torch.zeros(8, 1024)}, file)
    with pytest.raises(InputError, match="--pipeline_config sd21_v"):
        find_single_file(file, None, None, False)
    assert find_single_file(file, "sd21_base", None, False).architecture == "sd21_base"
    original = tmp_path / "v2-inference-v.yaml"
    original.write_text("model:\n  params:\n    parameterization: v\n    linear_start: 0.001\n    linear_end: 0.02\n")
    found = find_single_file(file, None, original, False)
    scheduler = found._scheduler({"scheduler": ["diffusers", "DDIMScheduler"]})
    assert (scheduler.config.prediction_type, scheduler.config.beta_start) == ("v_prediction", 0.001)
    save_file({name: torch.zeros(8, 99)}, file)
    with pytest.raises(InputError, match="width 99"):
        find_single_file(file, None, None, False)


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_published_layout_needs_nothing_but_the_file(original_file, tmp_path, name):
    """Real depth and names, narrow; tokenizers and scheduler are the packaged ones."""
    pipe = getattr(architectures, name)(width_divisor=8)
    file = original_file(pipe, tmp_path / "model.safetensors")
    shutil.copytree(config_folder(name), tmp_path / "config")
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            (tmp_path / "config" / part / "config.json").write_text(
                json.dumps(dict(module.config.to_dict())) if part.startswith("text") else module.to_json_string()
            )
    single = SingleFile(file, tmp_path / "config", name, None)
    loaded = single.load(torch.float32)
    assert all(torch.equal(value, loaded.unet.state_dict()[key]) for key, value in pipe.unet.state_dict().items())
    assert all(torch.equal(value, loaded.vae.state_dict()[key]) for key, value in pipe.vae.state_dict().items())
    assert set(single.stored_names(loaded.unet)) == set(pipe.unet.state_dict())
    assert type(loaded.scheduler) is type(pipe.scheduler)
    ours, theirs = (DiffusionModel(each).encode(["a dog", "\u200b x"]) for each in (loaded, pipe))
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=0, atol=1e-5)
    for key, value in theirs.added.items():
        torch.testing.assert_close(ours.added[key], value, rtol=0, atol=1e-5)


class TestBadInput:
    def test_other_files(self, folders, lora_file, tmp_path):
        file = tmp_path / "x.safetensors"
        save_file({"a": torch.zeros(2)}, file)
        with pytest.raises(InputError, match="no Stable Diffusion UNet"):
            load(file)
        with pytest.raises(InputError, match="is a LoRA file.*--lora"):
            load(lora_file("sd", tmp_path / "lora", "kohya"))
        (tmp_path / "y.safetensors").write_text("not one")
        with pytest.raises(InputError, match="no readable safetensors"):
            load(tmp_path / "y.safetensors")

    def test_unet_only_and_wrong_configs(self, build, folders, original_file, tmp_path):
        file = original_file(build("sd"), tmp_path / "one.safetensors")
        with pytest.raises(InputError, match="neither a folder"):
            load(file, config=tmp_path)
        with pytest.raises(InputError, match="one.safetensors"):
            load(file, config=folders("sd2"))
        state = {name: value for name, value in load_file(file).items() if name.startswith("model.")}
        save_file(state, tmp_path / "unet.safetensors")
        with pytest.raises(InputError, match="unet.safetensors"):
            load(tmp_path / "unet.safetensors", config=folders("sd"))
        with pytest.raises(InputError, match="no Stable Diffusion config"):
            load(file, config=folders("sd"), original_config=folders("sd") / "model_index.json")
