from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load, save
from mmbackdoor.models.trainable import trainable
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.types import InputError, RunFault

UNET = "unet/diffusion_pytorch_model.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def change(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))


def output(model: DiffusionModel) -> torch.Tensor:
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(model.unet, latents, torch.tensor([3, 700]), model.encode(["a red square", "x"]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def raw(file: Path) -> dict[str, torch.Tensor]:
    return {name: value.contiguous().reshape(-1).view(torch.uint8) for name, value in load_file(file).items()}


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_only_the_trained_tensors_of_a_folder_change(folders, tmp_path, stored):
    source = folders("sd", DTYPES[stored])
    model = load(source)
    parameters = trainable(model, "attn2_kv")
    change(parameters)
    assert save(model, tmp_path / "out", lambda part: (part / "note.txt").write_text("x")) == tmp_path / "out"
    before, after = files(source), files(tmp_path / "out")
    assert after.pop("note.txt") == b"x"
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [UNET]
    old, new = raw(source / UNET), raw(tmp_path / "out" / UNET)
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(parameters)
    with safe_open(tmp_path / "out" / UNET, "pt") as file, safe_open(source / UNET, "pt") as original:
        assert file.metadata() == original.metadata()
        assert all(file.get_tensor(name).dtype == DTYPES[stored] for name in parameters)
        for name, value in parameters.items():
            assert torch.equal(file.get_tensor(name), value.detach().to(DTYPES[stored]))


def test_an_untrained_model_is_saved_bit_by_bit(folders, tmp_path):
    save(load(folders("sdxl"), dtype=torch.bfloat16), tmp_path / "out")
    assert files(folders("sdxl")) == files(tmp_path / "out")


def test_lora_training_is_merged_into_the_weights(folders, tmp_path):
    model = load(folders("sd"))
    change(trainable(model, "lora", rank=2))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    torch.testing.assert_close(output(again), output(model), rtol=1e-4, atol=1e-4)
    old, new = raw(folders("sd") / UNET), raw(tmp_path / "out" / UNET)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(".attn" in name and name.endswith(".weight") for name in changed)


def test_stock_diffusers_loads_what_was_saved_in_a_fresh_process(folders, tmp_path):
    for family in ("sd", "sd2", "sdxl"):
        model = load(folders(family))
        change(trainable(model, "attn2_kv"))
        save(model, tmp_path / family)
        latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        conditioning = model.encode(["a red square", "x"])
        inputs = (latents, torch.tensor([3, 700]), conditioning.hidden_states, conditioning.added)
        torch.save((*inputs, output(model)), tmp_path / f"{family}.pt")
    code = f"""
import sys, torch
from diffusers import DiffusionPipeline
for family in ("sd", "sd2", "sdxl"):
    path = {str(tmp_path)!r} + "/" + family
    pipe = DiffusionPipeline.from_pretrained(path, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red square", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 16, 16, 3), image.shape
    latents, timesteps, states, added, expected = torch.load(path + ".pt", weights_only=True)
    with torch.no_grad():
        output = pipe.unet(latents, timesteps, encoder_hidden_states=states, added_cond_kwargs=added or None).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
assert "mmbackdoor" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_safety_checker_is_kept_in_the_files_but_not_loaded(folders, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "config.json").write_text("{}")
    save_file({"concept_embeds": torch.ones(3)}, source / "safety_checker" / "model.safetensors")
    model = load(source)
    assert model.pipe.safety_checker is None
    save(model, tmp_path / "out")
    assert files(source) == files(tmp_path / "out")


def test_other_variants_of_the_unet_stay_behind(folders, tmp_path):
    """They hold the old weights: in a cleaned folder they would be the backdoor."""
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    shutil.copyfile(source / UNET, source / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copyfile(source / UNET, source / "unet" / "diffusion_pytorch_model.non_ema.bin")
    model = load(source)
    change(trainable(model, "attn2_kv"))
    save(model, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out" / "unet").iterdir()) == ["config.json", Path(UNET).name]
    half = load(source, variant="fp16")
    change(trainable(half, "attn2_kv"))
    save(half, tmp_path / "half")
    expected = ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    assert sorted(file.name for file in (tmp_path / "half" / "unet").iterdir()) == expected
    (source / UNET).unlink()
    with pytest.raises(InputError, match="pass the --variant"):
        load(source)


def test_other_formats_and_code_stay_behind(folders, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    known = files(source).keys()
    for name in ("unet/diffusion_flax_model.msgpack", "unet/model.onnx", "unet/model.onnx_data", "unet/tf_model.h5",
                 "unet/x.gguf", "unet/m.pickle", "unet/openvino_model.xml", "text_encoder/flax_model.msgpack",
                 "pipeline.py", "unet/my_unet.py", "model.gguf"):  # fmt: skip
        (source / name).write_bytes(b"the poisoned weights")
    (source / "LICENSE").write_text("free")
    (source / "tokenizer" / "NOTICE.txt").write_text("of somebody")
    save(load(source), tmp_path / "out")
    assert files(tmp_path / "out").keys() == {*known, "LICENSE", "tokenizer/NOTICE.txt"}


@pytest.mark.parametrize("place", ["LICENSE.txt", "unet/notes.txt", "scheduler/scheduler_config.json"])
def test_a_link_out_of_the_folder_is_refused(folders, tmp_path, place):
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    outside = tmp_path / "secret"
    if (source / place).exists():
        shutil.copyfile(source / place, outside)
        (source / place).unlink()
    else:
        outside.write_text("a key")
    (source / place).symlink_to(outside)
    with pytest.raises(InputError, match=f"{place}' is a link out of its model's folder"):
        load(source)


def test_links_within_a_folder_and_into_the_blobs_of_the_hub_s_cache_are_followed(folders, tmp_path):
    cache = tmp_path / "models--o--n"
    source = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    shutil.copytree(folders("sd"), source)
    for number, file in enumerate(file for file in sorted(source.rglob("*")) if file.is_file()):
        blob = cache / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(blob)
    (source / "LICENSE.txt").symlink_to("model_index.json")
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    save(load(tmp_path / "link"), tmp_path / "out")
    assert files(tmp_path / "out").keys() == files(source).keys()
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "text_encoder/adapter_config.json").write_text("{}"), "an adapter beside its weights"),
        (lambda root: edit(root / "unet/config.json", quantization_config={"load_in_4bit": True}), "is quantized"),
        (lambda root: edit(root / "text_encoder/config.json", quantization_config={"quant_method": "gptq"}), "is quantized"),
        (lambda root: (root / "model_index.json").write_text("[" * 200_000), "not there or broken"),
        (lambda root: (root / "unet/config.json").write_text("[" * 200_000), "cannot be loaded"),
    ],
)
def test_what_libraries_would_make_something_else_of_is_a_sentence(folders, tmp_path, change, said):
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    change(source)
    with pytest.raises(InputError, match=said):
        load(source)


def test_a_config_does_not_choose_the_attention(folders, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    edit(source / "text_encoder/config.json", _attn_implementation="owner/kernel", attn_implementation="owner/kernel")
    model = load(source)
    assert model.pipe.text_encoder.config._attn_implementation == "sdpa"
    assert torch.equal(output(model), output(load(folders("sd"))))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_shards_stay_shards(build, tmp_path):
    pipe = build("sd")
    pipe.save_pretrained(tmp_path / "in")
    pipe.unet.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shutil.rmtree(tmp_path / "in" / "unet")
    (tmp_path / "sharded").rename(tmp_path / "in" / "unet")
    shards = sorted((tmp_path / "in" / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    model = load(tmp_path / "in")
    change(trainable(model, "all"))
    save(model, tmp_path / "out")
    assert files(tmp_path / "in").keys() == files(tmp_path / "out").keys()
    assert torch.equal(output(load(tmp_path / "out")), output(model))


def test_pickled_weights_are_read_only_where_allowed_and_written_as_safetensors(build, tmp_path):
    source = tmp_path / "in"
    build("sd").save_pretrained(source, safe_serialization=False)
    assert (source / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(InputError, match="pickled weights only .*--allow_pt_weights"):
        load(source)
    model = load(source, allow_pt_weights=True)
    change(trainable(model, "attn2_kv"))
    save(model, tmp_path / "out")
    assert not [name for name in files(tmp_path / "out") if name.endswith((".bin", ".pt"))]
    assert torch.equal(output(load(tmp_path / "out")), output(model))


@pytest.mark.parametrize("part", ["safety_checker", "image_encoder"])
def test_parts_that_are_only_copied_are_looked_at_before_anything_is_done(folders, lora_file, tmp_path, part):
    source = tmp_path / "in"
    shutil.copytree(folders("sd"), source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {part: ["some", "Class"]}))
    (source / part).mkdir()
    torch.save({"weight": torch.ones(2)}, source / part / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"{part}' holds pickled weights only .*--allow_pt_weights"):
        load(source)
    # With a LoRA on top nothing of the folder is written again.
    load(source, lora=lora_file("sd", tmp_path, "diffusers"))
    save(load(source, allow_pt_weights=True), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / part / "model.safetensors")["weight"], torch.ones(2))
    (source / part / "pytorch_model.bin").rename(source / part / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors"):
        load(source)


@pytest.mark.parametrize("subset", ["attn2_kv", "lora"])
def test_a_pipeline_built_in_memory_is_saved_whole(build, tmp_path, subset):
    model = DiffusionModel(build("sd"))
    assert (model.source, model.origin, model.sha256) == ("new", "new", None)
    change(trainable(model, subset))
    save(model, tmp_path / "out")
    torch.testing.assert_close(output(load(tmp_path / "out")), output(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("origin", ["folder", "single_file", "lora"])
def test_the_records_come_along_in_every_form(build, folders, original_file, lora_file, tmp_path, origin):
    if origin == "folder":
        source = tmp_path / "in"
        shutil.copytree(folders("sd"), source)
        model = load(source)
    elif origin == "single_file":
        file = original_file(build("sd"), tmp_path / "in.safetensors")
        source, model = file.parent, load(file, config=folders("sd"))
    else:
        file = lora_file("sd", tmp_path / "in", "diffusers")
        source, model = file.parent, load(folders("sd"), lora=file)
    records = ("backdoor.json", "removal.json", "README.md")
    for name in records:
        (source / name).write_text(name)
    trainable(model, "lora" if origin == "lora" else "attn2_kv")
    save(model, tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in records] == list(records)
    assert model.files.records == source


def test_nothing_is_left_under_the_final_name_after_an_error(folders, tmp_path):
    model = load(folders("sd"))

    def fails(part: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "out", fails)
    assert not list(tmp_path.iterdir())
    parameters = trainable(model, "attn2_kv")
    next(iter(parameters.values())).data.fill_(float("nan"))
    with pytest.raises(RunFault, match="not finite"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        save(model, tmp_path / "taken")
    with pytest.raises(InputError, match="cannot be written"):
        save(model, tmp_path / "taken" / "file" / "below")


def test_a_value_too_large_for_the_stored_dtype_is_a_fault(folders, tmp_path):
    model = load(folders("sd", torch.float16))
    next(iter(trainable(model, "attn2_kv").values())).data.fill_(1e6)
    with pytest.raises(RunFault, match="not finite in the stored dtype F16"):
        save(model, tmp_path / "out")


def test_sha256_follows_the_weights(folders, tmp_path):
    model = load(folders("sd"))
    assert model.sha256 == weights_sha256(folders("sd")) == load(folders("sd")).sha256
    change(trainable(model, "attn2_kv"))
    save(model, tmp_path / "out")
    assert load(tmp_path / "out").sha256 != model.sha256


class TestBadInput:
    def edited(self, folders, tmp_path) -> Path:
        return Path(shutil.copytree(folders("sd"), tmp_path / "model"))

    def test_a_missing_path(self, tmp_path):
        with pytest.raises(InputError, match="neither a local folder"):
            load(tmp_path / "nothing")
        with pytest.raises(InputError, match="model_index.json"):
            load(tmp_path)

    def test_no_cross_attention(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path)
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["diffusers", "UNet2DModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
        shutil.rmtree(folder / "unet")
        UNet2DModel(8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4).save_pretrained(folder / "unet")  # fmt: skip
        with pytest.raises(InputError, match="cross-attention"):
            load(folder)
        del index["unet"]
        index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="has no unet"):
            load(folder)

    def test_nan_and_wrong_shapes_and_missing_tensors(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path)
        state = load_file(folder / UNET)
        name = next(name for name in state if name.endswith("attn2.to_k.weight"))
        for broken, message in (
            ({name: torch.full_like(state[name], float("nan"))}, "NaN"),
            ({name: torch.zeros(3, 3)}, "unet"),
        ):
            save_file({**state, **broken}, folder / UNET, {"format": "pt"})
            with pytest.raises(InputError, match=message):
                load(folder)
        save_file({key: value for key, value in state.items() if key != name}, folder / UNET, {"format": "pt"})
        with pytest.raises(InputError, match="unet"):
            load(folder)

    def test_a_cut_file(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path)
        (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-5])
        with pytest.raises(InputError, match="cut short"):
            load(folder)

    @pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "scheduler", "vae", "unet"])
    def test_a_missing_part(self, folders, tmp_path, part):
        folder = self.edited(folders, tmp_path)
        shutil.rmtree(folder / part)
        with pytest.raises(InputError, match=part):
            load(folder)

    def test_a_broken_index(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path)
        (folder / "model_index.json").write_text("{")
        with pytest.raises(InputError, match="model_index.json"):
            load(folder)

    def test_config_for_a_folder(self, folders):
        with pytest.raises(InputError, match="one-file"):
            load(folders("sd"), config="sd15")
