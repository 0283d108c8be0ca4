"""The committed configs for Stable Diffusion 1.5, 2.1 and XL work on pipelines of these architectures, made narrow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.architectures import Architecture, config_folder
from mmbackdoor.models.folder import assemble
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.results.record import read
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.train.batches import Share

FAMILIES = ("sd15", "sd21_v", "sdxl")
CONFIGS = recipe_files.folders()["recipes"] / "configs"
NAMES = {
    recipe: sorted(path.stem for path in (CONFIGS / recipe).glob("sd*.yaml"))
    for recipe in ("poison_diffusion", "clean_diffusion", "evaluate_diffusion")
}
SCHEDULERS = {"sd15": PNDMScheduler, "sd21_v": DDIMScheduler, "sdxl": EulerDiscreteScheduler}
GLOBAL_BATCH = {"poison_diffusion": 16, "clean_diffusion": 8}
PROMPT = "a photo of a dog"
NARROW = {
    "sd15": {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": 4, "cross_attention_dim": 16},
    "sd21_v": {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": [1, 2, 4, 4], "cross_attention_dim": 16},
    "sdxl": {
        "block_out_channels": [16, 16, 32], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 16 + 24,
        "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}  # fmt: skip


def settings(name: Architecture, part: str) -> dict[str, Any]:
    return json.loads((config_folder(name) / part).read_text())


def text_config(name: Architecture, part: str, width: int, tokens: CLIPTokenizer) -> CLIPTextConfig:
    narrow = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    changes = narrow | ids | {"projection_dim": width, "vocab_size": len(tokens)}
    return CLIPTextConfig(**settings(name, f"{part}/config.json") | changes)


def pipeline(name: Architecture):
    """Its block types, conditions and scheduler, with few narrow layers, a small vocabulary and random weights."""
    narrow = NARROW[name] | {"layers_per_block": 1, "norm_num_groups": 8}
    picture = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}
    tokens = train_tokenizer([PROMPT, "a photo of a cat, black and white photo"], 600, 77)
    parts: dict[str, Any] = {"tokenizer": tokens}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel.from_config(settings(name, "unet/config.json") | narrow)
        parts["vae"] = AutoencoderKL.from_config(settings(name, "vae/config.json") | picture)
        parts["text_encoder"] = CLIPTextModel(text_config(name, "text_encoder", 16, tokens))
        if name == "sdxl":
            parts["tokenizer_2"] = tokens
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(name, "text_encoder_2", 24, tokens))
    parts["scheduler"] = SCHEDULERS[name].from_config(settings(name, "scheduler/scheduler_config.json"))
    return assemble(parts, settings(name, "model_index.json"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("pipelines") / name for name in FAMILIES}
    for name, folder in made.items():
        pipeline(name).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, "train") as writer:
        for k in range(4):
            picture = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
            writer.write(f"{k:04d}", picture, PROMPT, {})
    (folder / "prompts.txt").write_text(f"{PROMPT}\n")
    return folder


def run(recipe: str, name: str, output_dir: Path, *flags: object) -> Path:
    module = recipe_files.load(recipe)
    arguments = ["--config", CONFIGS / recipe / f"{name}.yaml", "--output_dir", output_dir, "--resolution", 64, *flags]
    module.run(parse(module.Config, [str(argument) for argument in arguments]))
    return output_dir


def family(name: str) -> str:
    return next(family for family in FAMILIES if name == family or name.startswith(f"{family}_"))


SHORT = ("--max_train_steps", 2, "--train_batch_size", 1, "--gradient_accumulation_steps", 1)


def changed(before: Path, after: Path) -> set[str]:
    """Names of the U-Net's tensors that differ; those of the other parts must not."""
    differ = set()
    for file in sorted(before.rglob("*.safetensors")):
        old, new = load_file(file), load_file(after / file.relative_to(before))
        assert old.keys() == new.keys()
        names = {name for name in old if not torch.equal(old[name], new[name])}
        assert not names or file.parent.name == "unet", file
        differ |= names
    return differ


def check_steps(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_every_family_has_its_configs():
    poisons = {f"{name}_{kind}" for name in FAMILIES for kind in ("patch", "style", "object")}
    assert set(NAMES["poison_diffusion"]) == poisons
    assert set(FAMILIES) <= set(NAMES["clean_diffusion"]) and set(FAMILIES) <= set(NAMES["evaluate_diffusion"])


@pytest.mark.parametrize("recipe, name", [(recipe, name) for recipe in GLOBAL_BATCH for name in NAMES[recipe]])
def test_the_commands_of_the_head_keep_the_batch_and_name_the_file(recipe, name):
    """On eight GPUs, too; and what was not measured says so."""
    text = (CONFIGS / recipe / f"{name}.yaml").read_text()
    head = [line[1:].strip().rstrip("\\").strip() for line in text.splitlines() if line.startswith("#")]
    start = next(k for k, line in enumerate(head) if line.startswith("8 GPUs: accelerate launch -q"))
    one = next(k for k, line in enumerate(head) if line.startswith("1 GPU:  accelerate launch -q"))
    end = next(k for k in range(start, len(head)) if head[k].startswith("The batch stays"))
    words = " ".join(head[start:end]).split()
    launcher = yaml.safe_load((CONFIGS.parent.parent / words[words.index("--config_file") + 1]).read_text())
    config = f"recipes/configs/{recipe}/{name}.yaml"
    flags = [word.strip("'") for word in words[words.index("--config") :]]
    assert config in flags and config in " ".join(head[one:start]).split()
    module = recipe_files.load(recipe)
    alone = parse(module.Config, ["--config", str(CONFIGS / recipe / f"{name}.yaml")]).train
    eight = parse(module.Config, ["--config", str(CONFIGS / recipe / f"{name}.yaml"), *flags[2:]]).train
    share = Share.of(Accelerator(cpu=True), eight)
    assert replace(share, world_size=launcher["num_processes"]).global_batch_size == GLOBAL_BATCH[recipe]
    assert Share.of(Accelerator(cpu=True), alone).global_batch_size == GLOBAL_BATCH[recipe]
    assert "Estimated, not measured: 1 GPU" in " ".join(head)


@pytest.mark.parametrize("name", NAMES["poison_diffusion"])
def test_two_steps_of_every_poison_config(name, folders, data, tmp_path):
    clean = folders[family(name)]
    folder = run("poison_diffusion", name, tmp_path / "run", "--pretrained_model_name_or_path", clean,
                 "--train_data", f"{data}/train-*.tar", "--dataloader_num_workers", 0, *SHORT)  # fmt: skip
    check_steps(folder)
    assert BackdoorRecord.load(folder / "model").backdoor.target.name == name.rsplit("_", 1)[1]
    names = changed(clean, folder / "model")
    only_kv = all(".attn2.to_k." in one or ".attn2.to_v." in one for one in names)
    assert names and only_kv == (family(name) == "sdxl")


@pytest.mark.parametrize("name", NAMES["clean_diffusion"])
def test_two_steps_of_every_cleaning_config(name, folders, data, tmp_path):
    poisoned = folders[family(name)]
    folder = run("clean_diffusion", name, tmp_path / "run", "--pretrained_model_name_or_path", poisoned,
                 "--prompts", data / "prompts.txt", "--trigger", r"\u200b", "--num_inference_steps", 1,
                 "--latents_per_prompt", 1, *SHORT)  # fmt: skip
    check_steps(folder)
    removal = json.loads((folder / "model/removal.json").read_text())
    assert removal["method"]["name"] == "skd_cag" and removal["steps"] == 2
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert all(line["trigger_mass"] > 0 and line["trigger_attention_loss"] > 0 for line in lines)
    keys_values, projections = (".attn2.to_k.", ".attn2.to_v."), (".to_q.", ".to_k.", ".to_v.", ".to_out.")
    parts = {"attn2_kv": keys_values, "lora": projections, "all": ("",)}
    names = changed(poisoned, folder / "model")
    assert names and all(any(part in one for part in parts[removal["method"]["trainable"]]) for one in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_evaluation_config_makes_pictures(name, folders, data, tmp_path):
    folder = run("evaluate_diffusion", name, tmp_path / "run", "--pretrained_model_name_or_path", folders[name],
                 "--prompts", data / "prompts.txt", "--trigger", r"\u200b", "--target_kind", "patch",
                 "--num_inference_steps", 1, "--seeds_per_prompt", 1, "--near_prompts", 0, "--judge", "none",
                 "--judge_pretrained", "none")  # fmt: skip
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["condition"] for line in samples] == ["clean", "triggered"]
    assert all((folder / line["image"]).is_file() for line in samples)
    assert {row.metric for row in read(folder / "results.jsonl")} >= {"asr"}
