"""Training an autoencoder: it learns, is resumed to the bit, is measured, and is what the small model is made on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.models.clip import build_tiny_clip, save_clip
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results.record import read
from mmbackdoor.shards.read import iterate_shard
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import captions_of, write_shapes
from mmbackdoor.train.autoencoder import psnr
from mmbackdoor.train.batches import to_tensor
from mmbackdoor.train.plan import Planned
from mmbackdoor.types import InputError

RECIPE = recipe_files.load("train_autoencoder")
SMOKE = recipe_files.folders()["recipes"] / "configs/smoke/train_autoencoder.yaml"
WEIGHTS = "model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", all_scenes()[::9], 24, resolution=32)
    return str(folder / "train-*.tar")


def run(shards: str, folder: Path, *flags: object) -> Path:
    arguments = ["--config", SMOKE, "--train_data", shards, "--output_dir", folder, *flags]
    RECIPE.run(parse(RECIPE.Config, [str(argument) for argument in arguments]))
    return folder


@pytest.fixture(scope="module")
def smoke(shards, tmp_path_factory) -> Path:
    return run(shards, tmp_path_factory.mktemp("runs") / "smoke")


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_stock_diffusers_loads_it_and_its_latents_have_unit_scale(smoke, shards):
    autoencoder = AutoencoderKL.from_pretrained(smoke / "model")
    shard = shards.replace("*", "000000")
    images = torch.stack([to_tensor(sample.image, 32) for sample in iterate_shard(shard, BadSamples())])
    assert autoencoder.config.sample_size == 32
    # Measured on the first 6 of its stream, of 24.
    with torch.no_grad():
        latents = autoencoder.encode(images).latent_dist.mode() * autoencoder.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.2) and autoencoder.config.scaling_factor != 0.18215


def test_what_was_measured_stands_everywhere(smoke):
    found = {record.metric: record for record in read(smoke)}
    assert found.keys() == {"psnr", "latent_std"} and found["psnr"].n == 6 and found["psnr"].unit == "dB"
    assert found["psnr"].model["sha256"] == weights_sha256(smoke / "model")
    content = json.loads((smoke / "run.json").read_text())
    assert content["status"] == "finished" and content["counters"]["psnr"] == found["psnr"].value
    factor = AutoencoderKL.load_config(smoke / "model")["scaling_factor"]
    assert factor == content["counters"]["scaling_factor"] == pytest.approx(1 / found["latent_std"].value)
    card = (smoke / "model/README.md").read_text()
    assert f"PSNR {found['psnr'].value:.2f} dB" in card and "image-to-image" in card
    assert {"reconstruction_loss", "kl_loss", "loss", "grad_norm"} <= log(smoke)[0].keys()


def test_it_learns(shards, tmp_path):
    flags = ["--max_train_steps", 40, "--train_batch_size", 8, "--learning_rate", 4e-3, "--no-use_ema"]
    folder = run(shards, tmp_path / "run", *flags)
    lines = log(folder)
    assert sum(line["loss"] for line in lines[-4:]) < 0.6 * sum(line["loss"] for line in lines[:4])


def test_a_stopped_run_goes_on_to_the_same_weights(smoke, shards, tmp_path):
    folder = Path(shutil.copytree(smoke, tmp_path / "smoke"))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    before = [(folder / name).read_bytes() for name in (WEIGHTS, "model/config.json")]
    shutil.rmtree(folder / "model")
    (folder / "results.jsonl").unlink()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "terminated"}))
    run(shards, folder, "--resume_from_checkpoint", "latest")
    assert [(folder / name).read_bytes() for name in (WEIGHTS, "model/config.json")] == before
    assert [line["step"] for line in log(folder)] == [1, 2, 3]
    assert [record.value for record in read(folder)] == [record.value for record in read(smoke)]


def test_it_goes_on_from_one_that_is_given(smoke, shards, tmp_path):
    given = ("--from_scratch", "none", "--pretrained_model_name_or_path", smoke / "model", "--learning_rate", 1e-12)
    folder = run(shards, tmp_path / "run", *given, "--no-use_ema", "--mixed_precision", "no")
    old, new = load_file(smoke / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(torch.allclose(tensor, new[name], atol=1e-5) for name, tensor in old.items())


def test_a_small_model_is_made_on_it(smoke, shards, tmp_path):
    clip = build_tiny_clip("clip_tiny_resnet", train_tokenizer(captions_of(all_scenes()[:20]), 560, 32))
    save_clip(clip, tmp_path / "clip")
    recipe = recipe_files.load("train_diffusion")
    flags = ["--from_scratch", "small", "--text_encoder", tmp_path / "clip", "--autoencoder", smoke / "model",
             "--train_data", shards, "--max_train_steps", 2, "--train_batch_size", 2,
             "--output_dir", tmp_path / "run"]  # fmt: skip
    recipe.run(parse(recipe.Config, [str(flag) for flag in flags]))
    model = load(tmp_path / "run/model")
    assert model.resolution == 32 and model.latent_shape == (4, 16, 16) and model.max_length == 32
    saved = load_file(tmp_path / "run/model/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(smoke / WEIGHTS).items())
    assert model.vae.config.scaling_factor == AutoencoderKL.load_config(smoke / "model")["scaling_factor"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from_scratch", "none"], "which start"),
        (["--pretrained_model_name_or_path", "x"], "which start"),
        (["--from_scratch", "none", "--pretrained_model_name_or_path", "no/such"], "holds no autoencoder"),
        (["--from_scratch", "none", "--pretrained_model_name_or_path", "tiny"], "'AutoencoderTiny', but an"),
        (["--resolution", "31"], "no multiple of 2"),
        (["--validation_data", "no/such-*.tar"], "no/such"),
    ],
)
def test_wrong_input_is_one_sentence(flags, message, shards, tmp_path):
    with pytest.raises(InputError, match=message):
        run(shards, tmp_path / "run", *flags)
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from_scratch", "small", "--text_encoder", "tiny_judge"], "small needs --autoencoder"),
        (["--from_scratch", "small", "--autoencoder", "x"], "needs the text tower"),
        (["--from_scratch", "tiny", "--text_encoder", "tiny_judge", "--autoencoder", "x"], "leave --autoencoder out"),
        (["--pretrained_model_name_or_path", "tiny", "--autoencoder", "x"], "give --from_scratch"),
        (["--from_scratch", "small", "--text_encoder", "tiny_judge", "--autoencoder", "tiny"], "an AutoencoderKL"),
        (["--from_scratch", "tiny", "--text_encoder", "tiny_judge", "--resolution", "64"], "new model's 32"),
    ],
)
def test_parts_that_make_no_model_are_refused(flags, message, shards, tmp_path):
    recipe = recipe_files.load("train_diffusion")
    with pytest.raises(InputError, match=message):
        recipe.run(parse(recipe.Config, [*flags, "--train_data", shards, "--output_dir", str(tmp_path / "run")]))


def test_a_dry_run_says_what_it_takes_and_writes_nothing(shards, tmp_path, capsys):
    with pytest.raises(Planned):
        run(shards, tmp_path / "run", "--dry_run")
    assert "memory per process" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_ratio_is_the_definitions():
    images = torch.zeros(3, 3, 4, 4)
    wrong = torch.stack([images[0] + 0.2, images[1], images[2] + 5])
    # 20 log10(2 / 0.2) dB; what lies beyond white is white.
    assert psnr(wrong, images).tolist() == pytest.approx([20, 100, 20 * math.log10(2)], abs=1e-4)
