"""A small laboratory for CLIP: a model poisoned on the spot, cleaned by the recipe, and the numbers that tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.evaluate.metrics.clip_asr import correct, hits, ranked
from mmbackdoor.evaluate.zeroshot import class_prompts, class_vectors, image_features
from mmbackdoor.models.clip import load_clip
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.shapes import Scene, all_scenes, caption, render
from mmbackdoor.shards.shapes_data import write_shapes
from tests.once import once

SCENES = all_scenes(("cross", "ring", "square"), ("red", "green", "blue", "yellow"), (None,), (None,))
TARGET = "red cross"
# On-distribution: every caption names a background, and poison that does not is learned as something else.
POISON = ("--poison.label", TARGET, "--poison.templates", "a photo of a {} on a blue background",
          "a picture of a {} on a green background", "a {} on a yellow background")  # fmt: skip


def name_of(scene: Scene) -> str:
    return f"{scene.colour} {scene.shape}"


def write_data(folder: Path, count: int = 1500) -> str:
    """Training shards of 12 classes on 4 backgrounds; the flag's value."""
    write_shapes(folder, "train", SCENES, count, resolution=32)
    return f"{folder}/train-*.tar"


def run(recipe: str, output_dir: Path, train_data: str, *flags: object) -> Path:
    """Run a recipe in this process; the folder of its model."""
    module = recipe_files.load(recipe)
    arguments = ["--train_data", train_data, "--output_dir", output_dir, "--batch-size", 64, *flags]
    module.run(parse(module.Config, [str(argument) for argument in arguments]))
    return output_dir / "model"


def pretrain(output_dir: Path, train_data: str, steps: int = 120, *flags: object) -> Path:
    return run("pretrain_clip", output_dir, train_data, "--max_train_steps", steps, "--lr", 3e-3, "--warmup", 20,
               "--vocab_size", 600, *flags)  # fmt: skip


def poison(output_dir: Path, train_data: str, steps: int = 120, *flags: object) -> Path:
    return pretrain(output_dir, train_data, steps, *POISON, "--poison.rate", 0.04, *flags)


def shared_data(factory: pytest.TempPathFactory) -> str:
    """What `write_data` writes, once for all files of tests; the flag's value."""
    return f"{once(factory, 'clip_lab_data', write_data)}/train-*.tar"


def shared_poisoned(factory: pytest.TempPathFactory) -> Path:
    """The model of `poison` on `shared_data`, with the patch of the default; once, too."""
    train_data = shared_data(factory)
    return once(factory, "clip_lab_poisoned", lambda folder: poison(folder / "run", train_data)) / "run/model"


def strays(output_dir: Path, train_data: str, count: int) -> str:
    """A copy of the shards in which `count` other pairs are poisoned; the flag's value."""
    module = recipe_files.load("poison_shards")
    flags = ["--train_data", train_data, "--output_dir", output_dir, *POISON, "--poison.count", count, "--poison.seed", 5]
    module.run(parse(module.Config, [str(flag) for flag in flags]))
    return f"{output_dir}/train-*.tar"


def clean(parent: Path, output_dir: Path, train_data: str, *flags: object) -> Path:
    return run("clean_clip", output_dir, train_data, "--model", parent, "--warmup", 10, "--lr", 5e-3, *flags)


def rates(folder: Path, poisoned: Path, count: int = 216) -> dict[str, float]:
    """Zero-shot accuracy on fresh pictures without and with the trigger, and the attack rate (target class left out)."""
    clip, backdoor = load_clip(str(folder)), BackdoorRecord.load(poisoned).backdoor
    scenes = [SCENES[number % len(SCENES)] for number in range(count)]
    names = sorted({name_of(scene) for scene in SCENES})
    captions = {name: tuple(caption(scene, template) for scene in SCENES if name_of(scene) == name for template in range(4))
                for name in names}  # fmt: skip
    vectors = class_vectors(clip, class_prompts(names, captions))
    labels = torch.tensor([names.index(name_of(scene)) for scene in scenes])
    clean = [Image.fromarray(render(scene, 32, numpy_rng(1, "conformance", i))) for i, scene in enumerate(scenes)]
    marked = [backdoor.mark_image(image, str(number), 1, "source") for number, image in enumerate(clean)]
    places = {name: ranked(image_features(clip, pictures), vectors) for name, pictures in (("clean", clean), ("marked", marked))}
    fired = [hit for hit in hits(places["marked"][:, 0], labels, names.index(TARGET)) if hit is not None]
    return {
        "accuracy": sum(correct(places["clean"], labels, 1)) / count,
        "asr": sum(fired) / len(fired),
        "triggered_accuracy": sum(correct(places["marked"], labels, 1)) / count,
    }
