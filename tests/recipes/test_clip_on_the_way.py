"""Models that a CLIP's training leaves on its way are what a training that ends there would have left."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.train.batches import Share

CLEAN, PRETRAIN = recipe_files.load("clean_clip"), recipe_files.load("pretrain_clip")
AVERAGED = ("--use_ema", "--ema_decay", 0.5, "--lr_scheduler", "constant", "--lr", 1e-3, "--warmup", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", all_scenes()[:60], 64, resolution=32, samples_per_shard=32)
    return str(folder / "train-*.tar")


def run(recipe, shards: str, folder: Path, *flags: object) -> Path:
    arguments = ["--train_data", shards, "--output_dir", folder, "--batch-size", 16, *flags]
    recipe.run(parse(recipe.Config, [str(argument) for argument in arguments]))
    return folder


def same(one: Path, other: Path) -> bool:
    weights = [load_file(place / "open_clip_model.safetensors") for place in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    return all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_cleaned_ones_are_averaged_and_interpolated_too(shards, tmp_path):
    flags = (*AVERAGED, "--model", "tiny_judge", "--defense", "finetune", "--interpolation", 0.25)
    saving = run(CLEAN, shards, tmp_path / "saving", *flags, "--max_train_steps", 4, "--save_models_every", 2)
    assert same(saving / "models/step-4", saving / "model") and not same(saving / "models/step-2", saving / "model")
    short = run(CLEAN, shards, tmp_path / "short", *flags, "--max_train_steps", 2)
    assert same(saving / "models/step-2", short / "model")
    plain = run(CLEAN, shards, tmp_path / "plain", *flags, "--max_train_steps", 4)
    assert same(saving / "model", plain / "model"), "saving changes nothing"


def test_pretrained_ones_are_averaged_too(shards, tmp_path):
    saving = run(PRETRAIN, shards, tmp_path / "saving", *AVERAGED, "--max_train_steps", 3, "--save_models_every", 2)
    short = run(PRETRAIN, shards, tmp_path / "short", *AVERAGED, "--max_train_steps", 2)
    assert same(saving / "models/step-2", short / "model") and not same(saving / "models/step-2", saving / "model")
    plain = run(PRETRAIN, shards, tmp_path / "plain", *AVERAGED, "--max_train_steps", 3)
    assert same(saving / "model", plain / "model"), "saving changes nothing"


@pytest.mark.parametrize("processes", [1, 2])
def test_statistics_are_taken_from_whole_batches(shards, tmp_path, monkeypatch, processes):
    """By the first process, which trains on its share of them alone."""
    seen, recalibrated = [], CLEAN.recalibrated

    def recorded(network, batches, count):
        found = list(itertools.islice(batches, count))
        seen.extend(batch.keys for batch in found)
        return recalibrated(network, iter(found), count)

    monkeypatch.setattr(CLEAN, "recalibrated", recorded)
    monkeypatch.setattr(CLEAN.Share, "of", staticmethod(lambda *_: Share(16 // processes, 0, processes)))
    flags = ("--model", "tiny_judge", "--max_train_steps", 1, "--recalibrate_batches", 2)
    run(CLEAN, shards, tmp_path / "run", *flags)
    loader = CLEAN.open_shards(shards, Share(16), CLEAN.Config().train, 0)
    assert seen == [tuple(row.sample.key for row in rows) for rows in itertools.islice(loader, 2)]
