from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.models.clip import load_judge
from mmbackdoor.models.text_encoder import to_clip_text_model
from mmbackdoor.shards.shapes import all_scenes, caption
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.types import InputError

RECIPE = recipe_files.load("pretrain_clip")
CONFIGS = recipe_files.folders()["recipes"] / "configs"
WEIGHTS = "model/open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", all_scenes()[:60], 120, resolution=24, samples_per_shard=30)
    return str(folder / "train-*.tar")


def _run(shards: str, folder: Path, *flags: object) -> None:
    arguments = ["--train_data", shards, "--output_dir", folder, "--batch-size", 16, *flags]
    RECIPE.run(parse(RECIPE.Config, [str(argument) for argument in arguments]))


def test_it_learns_and_what_it_writes_is_a_judge_and_a_text_encoder(shards, tmp_path):
    _run(shards, tmp_path / "run", "--max_train_steps", 16, "--lr", 4e-3, "--random_tokens", 0.3)
    lines = [json.loads(line) for line in (tmp_path / "run/train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert sum(line["clip_loss"] for line in lines[-3:]) < 0.75 * sum(line["clip_loss"] for line in lines[:3])
    assert {"false_negatives", "logit_scale", "learning_rate"} <= lines[0].keys()
    judge = load_judge(str(tmp_path / "run/model"))
    assert judge.text_features([caption(scene) for scene in all_scenes()[:3]]).shape == (3, 64)
    model, tokenizer = to_clip_text_model(judge.clip)
    assert model.config.vocab_size == len(tokenizer) and tokenizer.model_max_length == 24
    assert "open_clip" in (tmp_path / "run/model/README.md").read_text()
    statistics = load_file(tmp_path / "run" / WEIGHTS)["visual.trunk.bn1.running_mean"]
    assert statistics.abs().max() > 0


def test_a_resumed_run_ends_with_the_same_bits(shards, tmp_path):
    flags = ("--max_train_steps", 6, "--checkpointing_steps", 3, "--random_tokens", 0.5)
    flags += ("--resume_from_checkpoint", "auto")
    folder = tmp_path / "run"
    _run(shards, folder, *flags)
    whole = (folder / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    _run(shards, folder, *flags)
    assert (folder / WEIGHTS).read_bytes() == whole


def test_two_processes_train_what_one_does(shards, tmp_path):
    """With the ViT: BatchNorm's statistics are those of each process."""
    # A large epsilon, since Adam's first steps are the signs of gradients, those of rounding noise too.
    flags = ["--model", "clip_tiny_vit", "--max_train_steps", "3", "--adam_epsilon", "1e-2", "--lr", "1e-2"]
    _run(shards, tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(recipe_files.folders()["recipes"] / "pretrain_clip.py"), "--train_data", shards,
               "--output_dir", str(tmp_path / "two"), "--batch-size", "8", *flags]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    losses = [
        [json.loads(line)["clip_loss"] for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][2] < losses[0][0]
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-5), name


def test_what_cannot_work_is_refused_before_anything_is_written(shards, tmp_path):
    for flags, words in (
        (("--gradient_accumulation_steps", 2), "adds no negatives"),
        (("--batch-size", 1), "a batch of 1 pair"),
        (("--vocab_size", 100), "vocab_size"),
        (("--objective", "siglap"), "clip"),
        (("--train_data", tmp_path / "none.tar"), "none.tar"),
    ):
        with pytest.raises(InputError, match=words):
            _run(shards, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tiny_encoder", "tiny_judge"])
def test_the_shipped_configs_are_read(name, shards):
    cfg = parse(RECIPE.Config, ["--config", str(CONFIGS / "pretrain_clip" / f"{name}.yaml"), "--train_data", shards])
    assert cfg.train.train_batch_size == 128 and cfg.model.model == "clip_tiny_resnet"


def test_the_smoke_config_runs(shards, tmp_path):
    _run(shards, tmp_path / "run", "--config", CONFIGS / "smoke" / "pretrain_clip.yaml")
    assert (tmp_path / "run" / WEIGHTS).exists()
