"""A LoRA that carries a backdoor: cleaned, and measured beside what it was and beside its base, through the recipes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.lora_files import FILE_NAME, is_lora
from mmbackdoor.models.provenance import read_removal
from mmbackdoor.models.shipped import shipped
from mmbackdoor.models.single_file import only_file
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.targets import PatchTarget
from mmbackdoor.triggers import WordTrigger

CONFIGS = recipe_files.folders()["recipes"] / "configs"


def random_lora(folder: Path) -> Path:
    """On the tiny model's cross-attention, strong enough to be seen in its pictures."""
    unet = StableDiffusionPipeline.from_pretrained(shipped("tiny")).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["attn2.to_k", "attn2.to_v"]))
    draws = torch.Generator().manual_seed(0)
    factors = get_peft_model_state_dict(unet)
    layers = {name: 0.3 * torch.randn(value.shape, generator=draws) for name, value in factors.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / FILE_NAME


def run(name: str, config: str, *flags: object) -> None:
    recipe = recipe_files.load(name)
    recipe.run(parse(recipe.Config, ["--config", str(CONFIGS / config), *map(str, flags)]))


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    return random_lora(tmp_path_factory.mktemp("lora"))


def test_a_cleaned_lora_is_measured_beside_what_it_was_and_its_base(lora, tmp_path, capsys):
    flags = ("--pretrained_model_name_or_path", "tiny", "--trigger", "small")
    run("clean_diffusion", "clean_diffusion/tiny.yaml", *flags, "--lora", lora, "--max_train_steps", 2,
        "--train_batch_size", 2, "--mixed_precision", "no", "--defense.latents", "noise", "--output_dir",
        tmp_path / "cleaned")  # fmt: skip
    cleaned = tmp_path / "cleaned/model" / FILE_NAME
    assert read_removal(cleaned.parent)["parent_sha256"]
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n")
    run("evaluate_diffusion", "evaluate_diffusion/tiny.yaml", *flags, "--lora", cleaned, "--compare", lora,
        "--control", "tiny", "--target_kind", "patch", "--prompts", tmp_path / "prompts.txt", "--seeds_per_prompt", 1,
        "--near_prompts", 0, "--output_dir", tmp_path / "measured")  # fmt: skip
    assert "no cleaned model" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "measured/samples.jsonl").read_text().splitlines()]
    pictures = {}
    for line in lines:
        if line["condition"] == "clean":
            file = tmp_path / "measured" / line["image"]
            pictures.setdefault(line["model"], set()).add(file.read_bytes())
    assert pictures.keys() == {"clean", "unknown", "cleaned"}
    assert not pictures["clean"] & pictures["unknown"], "the base was drawn with the LoRA on it"
    assert not pictures["clean"] & pictures["cleaned"]


def test_a_lora_with_a_record_takes_it_along_however_often_it_is_cleaned(lora, tmp_path):
    place = tmp_path / "poisoned"
    place.mkdir()
    shutil.copy(lora, place)
    record = BackdoorRecord(Backdoor((WordTrigger("small"),), PatchTarget()), {"name": "badt2i_pixel"})
    replace(record, model_sha256=weights_sha256(place)).save(place)
    (place / "README.md").write_text("---\nlicense: openrail\n---\n# Their LoRA\n")
    for name in ("once", "twice"):
        run("clean_diffusion", "clean_diffusion/tiny.yaml", "--pretrained_model_name_or_path", "tiny", "--lora", place,
            "--max_train_steps", 1, "--train_batch_size", 2, "--mixed_precision", "no", "--defense.latents", "noise",
            "--output_dir", tmp_path / name)  # fmt: skip
        cleaned = tmp_path / name / "model"
        assert (cleaned / "backdoor.json").read_bytes() == (tmp_path / "poisoned/backdoor.json").read_bytes()
        assert "openrail" in (cleaned / "README.md").read_text()
        place = cleaned
    (tmp_path / "prompts.txt").write_text("a red square\n")
    run("evaluate_diffusion", "evaluate_diffusion/tiny.yaml", "--pretrained_model_name_or_path", "tiny", "--lora",
        place, "--compare", tmp_path / "poisoned", "--prompts", tmp_path / "prompts.txt", "--seeds_per_prompt", 1,
        "--near_prompts", 0, "--output_dir", tmp_path / "measured")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "measured/samples.jsonl").read_text().splitlines()]
    found = {(line["model"], line["condition"]) for line in lines}
    assert found >= {(model, condition) for model in ("poisoned", "cleaned") for condition in ("clean", "triggered")}


def test_other_models_are_taken_as_they_are(lora, tmp_path):
    main = DiffusionSource("tiny", "abc", lora="of_mine.safetensors", pipeline_config="sd15")
    whole = main.other("another/model")
    assert whole == DiffusionSource("another/model")
    other = main.other(str(lora))
    assert (other.path, other.lora, other.pipeline_config) == (shipped("tiny"), str(lora), "sd15")
    assert main.other(str(lora.parent)).lora == str(lora.parent)
    assert len({source.called for source in (main, whole, other, main.other("tiny"))}) == 4
    assert is_lora(lora) and not is_lora(shipped("tiny")) and not is_lora("another/model")


def test_a_folder_that_holds_one_checkpoint_file_stands_for_it(tmp_path):
    file = tmp_path / "one.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, file)
    (tmp_path / "removal.json").touch()
    assert only_file(str(tmp_path)) == str(file) == DiffusionSource(str(tmp_path)).path
    assert DiffusionSource("tiny", pipeline_config="sd15").other(str(file)).pipeline_config == "sd15"
    (tmp_path / "two.safetensors").touch()
    assert only_file(str(tmp_path)) == str(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    (tmp_path / "model_index.json").touch()
    assert only_file(str(tmp_path)) == str(tmp_path)
    assert only_file("owner/name") == "owner/name"
