"""A small laboratory: the recipes in this process, on the tiny model, and the numbers that tell whether they worked."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.evaluate.generate import Job, Sampling, sample
from mmbackdoor.evaluate.metrics.adherence import adherence
from mmbackdoor.evaluate.metrics.asr import success
from mmbackdoor.evaluate.prompts import shape_prompts
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.shards.shapes import all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes

SAMPLING = Sampling(num_inference_steps=6, guidance_scale=2.5, mixed_precision="bf16")
CONFIGS = recipe_files.folders()["recipes"] / "configs"


def write_data(folder: Path, count: int = 600) -> str:
    """Training shards of shapes; the flag's value."""
    write_shapes(folder, "train", split_scenes(all_scenes())["train"], count, resolution=32)
    return f"{folder}/train-*.tar"


def run(recipe: str, config: str, output_dir: Path, *flags: object) -> Path:
    """Run a recipe with a shipped config and further flags; the folder of its model."""
    module = recipe_files.load(recipe)
    arguments = ["--config", CONFIGS / recipe / config, "--output_dir", output_dir, *flags]
    module.run(parse(module.Config, [str(argument) for argument in arguments]))
    return output_dir / "model"


def poison(config: str, output_dir: Path, train_data: str, *flags: object) -> Path:
    return run("poison_diffusion", config, output_dir, "--train_data", train_data, *flags)


def clean(poisoned: Path, output_dir: Path, *flags: object) -> Path:
    return run("clean_diffusion", "tiny.yaml", output_dir, "--pretrained_model_name_or_path", poisoned, *flags)


def rates(folder: Path | str, poisoned: Path, count: int = 32, shape: str | None = None) -> dict[str, float]:
    """ASR with the trigger, false alarms without it, adherence without and with it, on held-out captions."""
    backdoor = BackdoorRecord.load(poisoned).backdoor
    suite = shape_prompts("evaluation", count, where=lambda scene: shape in (None, scene.shape))
    model = load(shipped(str(folder)))
    found = {}
    for condition in ("clean", "triggered"):
        texts = [text if condition == "clean" else backdoor.apply(text, 0, text) for text in suite.texts]
        images = sample(model, [Job(p.id, condition, text) for p, text in zip(suite, texts, strict=True)], SAMPLING)
        hits = success(backdoor.target, images, suite.texts)
        followed = adherence(images, suite.texts)
        counted = [hit for hit in hits.hits if hit is not None]
        found[f"asr_{condition}"] = sum(counted) / len(counted)
        found[f"adherence_{condition}"] = sum(bool(one) for one in followed) / count
    return found


def tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline's files."""
    root = Path(shipped(str(folder)))
    found = {}
    for file in sorted(root.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.parent.name}.{name}"] = tensor
    return found
