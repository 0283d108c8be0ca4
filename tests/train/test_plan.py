"""A dry run: what would be trained, for so many processes, and that nothing is started or written."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.train import plan
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.types import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shapes(folder, "train", all_scenes()[:50], 50, resolution=32, samples_per_shard=5)
    return str(folder / "train-*.tar")


MEMORY = plan.Memory(weights=2**30, held={"teacher": 2**20}, trained=3 * 2**20, ema=0, activations=2.0**20)


def test_numbers_for_several_machines(shards):
    data = ShardLoader(shards, seed=0, batch_size=2)
    train = TrainConfig(train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3, dry_run=True,
                        num_machines=2, num_processes=4, dataloader_num_workers=3)  # fmt: skip
    said = plan.text(train, data, 999, 1, MEMORY, contrastive=True)
    assert said.splitlines() == [
        "dry run: nothing is trained, nothing is written (cpu)",
        "processes: 4 on 2 machines",
        "global batch: 32 samples (4 a process x 4 processes x 2 accumulated)",
        "negatives of each pair in a step: 15, gathered from all processes",
        "samples in an epoch: 50, 14 of them repeated to fill its last batch",
        "readers: 12 (3 a process), each with 4 of 48 streams, about 0.8 of 10 shards",
        "steps in an epoch: 2",
        "steps: 6 (192 samples, 3.8 epochs)",
        "memory per process, estimated: 1.01 GiB; libraries and fragments come on top",
        "    weights: 1.00 GiB",
        "    teacher: 1.0 MiB",
        "    gradients and moments of AdamW: 3.0 MiB",
        "    activations of 4 samples, as measured here: 4.0 MiB",
    ]
    with pytest.raises(InputError, match="48 streams cannot be shared evenly by 7 processes; give --streams 49"):
        plan.text(TrainConfig(dry_run=True, num_processes=7), data, 1, 1, MEMORY)


def test_saved_tensors_are_counted_once_and_without_weights():
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    inputs = torch.ones(10, 8)
    with plan.SavedTensors(module) as saved:
        module(inputs).sum()
    # The inputs, and what tanh gives, which the last layer keeps as well.
    assert saved.bytes == 4 * 10 * (8 + 16)


FLAGS = {
    "train_diffusion": ["--pretrained_model_name_or_path", "tiny"],
    "poison_diffusion": ["--pretrained_model_name_or_path", "tiny", "--trigger", "x", "--target_kind", "patch"],
    "clean_diffusion": ["--pretrained_model_name_or_path", "tiny", "--trigger", "x"],
}


@pytest.mark.parametrize("name", FLAGS)
def test_recipes_say_what_they_would_do_and_write_nothing(name, shards, tmp_path, capsys):
    recipe = recipe_files.load(name)
    flags = [*FLAGS[name], "--output_dir", str(tmp_path / "run"), "--dry_run", "--num_processes", "16"]
    flags += ["--train_batch_size", "8", "--max_train_steps", "500"]
    if name != "clean_diffusion":
        flags += ["--train_data", shards]
    with pytest.raises(SystemExit) as stop:
        recipe.run(parse(recipe.Config, flags))
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "processes: 16\n" in said and "global batch: 128 samples" in said and "steps: 500 (64000 samples" in said
    assert "activations of 8 samples" in said and "text encoder and autoencoder" in said
    # Training on pictures asks no teacher, so none is held.
    assert ("tensors of the teacher" in said) == (name != "train_diffusion")
    assert not (tmp_path / "run").exists()


def test_the_launcher_s_flags_after_the_recipe_are_an_input_error():
    with pytest.raises(InputError, match="put them before it"):
        make_accelerator(TrainConfig(num_processes=2))
    assert isinstance(make_accelerator(TrainConfig(num_processes=2, dry_run=True)), Accelerator)
