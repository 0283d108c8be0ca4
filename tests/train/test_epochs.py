"""How long to train may be said in epochs, also where a number of steps is the default; and settings that would be in
vain are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmbackdoor import recipe_files
from mmbackdoor.config import changed, parse, to_yaml
from mmbackdoor.train.optim import total_steps
from mmbackdoor.types import InputError

BY_STEPS = ["clean_diffusion", "poison_diffusion", "train_diffusion", "train_autoencoder"]


def lengths(recipe: str, *flags: str) -> tuple[int | None, int | None]:
    train = parse(recipe_files.load(recipe).Config, list(flags)).train
    return train.max_train_steps, train.num_train_epochs


@pytest.mark.parametrize("recipe", BY_STEPS)
def test_epochs_take_the_place_of_the_default_number_of_steps(recipe):
    default, none = lengths(recipe)
    assert default is not None and none is None
    assert lengths(recipe, "--num_train_epochs", "3") == (None, 3)
    assert lengths(recipe, "--num_train_epochs", "none") == (default, None)
    assert lengths(recipe, "--num_train_epochs", "3", "--max_train_steps", "7") == (7, 3)
    train = parse(recipe_files.load(recipe).Config, ["--train.num_train_epochs", "3"]).train
    assert total_steps(train, 100, 16) == 21


def test_a_flag_takes_the_place_of_what_the_file_says(tmp_path: Path):
    file = tmp_path / "case.yaml"
    file.write_text("train: {max_train_steps: 7}")
    assert lengths("clean_clip", "--config", str(file)) == (7, 10)
    assert lengths("clean_clip", "--config", str(file), "--epochs", "2") == (None, 2)
    file.write_text("train: {max_train_steps: 7, num_train_epochs: 2}")
    assert lengths("clean_clip", "--config", str(file)) == (7, 2)
    file.write_text("train: {num_train_epochs: 2}")
    assert lengths("clean_diffusion", "--config", str(file)) == (None, 2)
    assert lengths("clean_diffusion", "--config", str(file), "--max_train_steps", "5") == (5, 2)


@pytest.mark.parametrize("flags", [(), ("--num_train_epochs", "3"), ("--max_train_steps", "5")])
@pytest.mark.parametrize("recipe", ["clean_diffusion", "clean_clip"])
def test_what_a_run_writes_down_is_read_as_the_same(recipe, flags, tmp_path: Path):
    kind = recipe_files.load(recipe).Config
    cfg = parse(kind, list(flags))
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert parse(kind, ["--config", str(tmp_path / "config.yaml")]) == cfg
    assert changed(cfg, ["--seed", "3"]).train == cfg.train
    assert changed(cfg, ["--num_train_epochs", "9"]).train.max_train_steps is None


def test_pictures_of_a_teacher_are_not_for_training_on_shards():
    with pytest.raises(InputError, match="--objective.latents teacher is for clean_diffusion"):
        parse(recipe_files.load("train_diffusion").Config, ["--objective.latents", "teacher"])
