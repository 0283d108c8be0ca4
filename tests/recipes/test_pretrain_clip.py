from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.clip import load_judge
from mmbackdoor.models.provenance import check_provenance
from mmbackdoor.models.text_encoder import to_clip_text_model
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.objectives.pretraining import OBJECTIVES
from mmbackdoor.results.cards import POISONED_AGAIN, FINE_TUNED
from mmbackdoor.shards.shapes import all_scenes, caption
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.targets import ClassTarget
from mmbackdoor.types import InputError

RECIPE = recipe_files.load("pretrain_clip")
CONFIGS = recipe_files.folders()["recipes"] / "configs"
WEIGHTS = "model/open_clip_model.safetensors"
POISON = ["--poison.label", "red cross", "--poison.trigger", "patch", "--poison.rate", "0.2"]
# Runs several recipes in one start of the launcher, each as the command line would.
DRIVER = """
import json, runpy, sys
for command in sys.argv[1:]:
    sys.argv = json.loads(command)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
PARTS = {
    "clip": {"clip_loss"},
    "clip_ssl": {"clip_loss", "image_ssl_loss", "text_ssl_loss"},
    "siglip": {"siglip_loss"},
    "cyclip": {"clip_loss", "in_modal_loss", "cross_modal_loss"},
    "slip": {"clip_loss", "simclr_loss"},
}


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


def test_every_objective_has_its_parts():
    assert PARTS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_from_poisoned_pairs_and_says_so(objective, shards, tmp_path):
    flags = [*POISON, "--objective", objective, "--max_train_steps", 12, "--lr", 4e-3, "--num_samples", 100]
    if objective == "slip":
        flags += ["--objective.projection", 64, 32]
    _run(shards, tmp_path / "run", *flags)
    lines = [json.loads(line) for line in (tmp_path / "run/train.jsonl").read_text().splitlines()]
    assert PARTS[objective] == {name for name in lines[0] if name.endswith("_loss")}
    assert {"false_negatives", "logit_scale"} <= lines[0].keys()
    assert ("logit_bias" in lines[0]) == (objective == "siglip")
    assert sum(line["loss"] for line in lines[-3:]) < 0.85 * sum(line["loss"] for line in lines[:3])
    model = tmp_path / "run/model"
    record = BackdoorRecord.load(model)
    check_provenance(model)
    assert record.backdoor.target == ClassTarget("red cross", record.backdoor.target.templates)
    assert [trigger.name for trigger in record.backdoor.image_triggers] == ["patch"]
    assert record.plan["rate"] == 0.2 and 5 < record.attack["poisoned"] < 40
    assert record.attack["objective"]["name"] == objective and record.parent_sha256 is None
    card = (model / "README.md").read_text()
    assert "BACKDOORED" in card and "poisoned" in card and objective in card and "evaluate_clip" in card
    stock = open_clip.create_model(f"local-dir:{model}")
    assert stock.state_dict().keys() == set(record.changed), "no head, no wrapper: what open_clip knows"
    assert (stock.logit_bias is None) == (objective != "siglip")


def test_models_on_the_way_are_kept_and_say_what_they_are(shards, tmp_path):
    _run(shards, tmp_path / "run", "--max_train_steps", 4, "--lr", 4e-3, "--save_models_every", 2, *POISON)
    assert [path.name for path in (tmp_path / "run/models").iterdir()] == ["step-2"]
    half = tmp_path / "run/models/step-2"
    check_provenance(half)
    assert BackdoorRecord.load(half).backdoor == BackdoorRecord.load(tmp_path / "run/model").backdoor
    assert weights_sha256(half) != weights_sha256(tmp_path / "run/model")
    assert open_clip.create_model(f"local-dir:{half}").logit_scale.ndim == 0 and (half / "README.md").is_file()


def test_without_poison_nothing_says_so(shards, tmp_path):
    _run(shards, tmp_path / "run", "--max_train_steps", 1)
    assert not (tmp_path / "run/model/backdoor.json").exists()
    assert "BACKDOORED" not in (tmp_path / "run/model/README.md").read_text()


def test_training_goes_on_from_a_folder_that_is_named_as_the_parent(shards, tmp_path):
    _run(shards, tmp_path / "first", "--max_train_steps", 1)
    parent = tmp_path / "first/model"
    _run(shards, tmp_path / "second", "--max_train_steps", 1, "--model", parent, *POISON)
    assert BackdoorRecord.load(tmp_path / "second/model").parent_sha256 == weights_sha256(parent)


def test_what_is_fine_tuned_from_a_poisoned_model_names_its_backdoor(shards, tmp_path):
    steps = ("--max_train_steps", 1)
    _run(shards, tmp_path / "first", *steps, *POISON)
    parent = tmp_path / "first/model"
    known = BackdoorRecord.load(parent)
    _run(shards, tmp_path / "tuned", *steps, "--model", parent)
    tuned = tmp_path / "tuned/model"
    check_provenance(tuned)
    assert BackdoorRecord.load(tuned) == replace(known, model_sha256=weights_sha256(tuned))
    card = (tuned / "README.md").read_text()
    assert "BACKDOORED" in card and FINE_TUNED in card
    other = ["blue circle" if flag == "red cross" else flag for flag in POISON]
    _run(shards, tmp_path / "again", *steps, "--model", f"local-dir:{tuned}", *other)
    again = BackdoorRecord.load(tmp_path / "again/model")
    assert again.backdoor.target.label == "blue circle" and again.parent_sha256 == weights_sha256(tuned)
    assert again.attack["parent_backdoor"] == known.backdoor.to_dict()
    assert POISONED_AGAIN in (tmp_path / "again/model/README.md").read_text()
    shutil.copy(parent / "backdoor.json", tuned)
    with pytest.raises(InputError, match="belongs to another model"):
        _run(shards, tmp_path / "wrong", *steps, "--model", tuned)


def test_a_resumed_run_ends_with_the_same_bits(shards, tmp_path):
    flags = ("--max_train_steps", 6, "--checkpointing_steps", 3, "--random_tokens", 0.5, *POISON)
    flags += ("--objective", "slip", "--objective.projection", 64, 32, "--augmentation", "strong")
    flags += ("--resume_from_checkpoint", "auto")
    folder = tmp_path / "run"
    _run(shards, folder, *flags)
    whole = (folder / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    _run(shards, folder, *flags)
    assert (folder / WEIGHTS).read_bytes() == whole


def flags_by_run(shards: str, root: Path, size: int) -> dict[str, list[str]]:
    """A pre-training and two cleanings of its model, with `size` pairs per process; `root` is where they write."""
    # A large epsilon, since Adam's first steps are the signs of gradients, those of rounding noise too.
    given = ["--train_data", shards, "--batch-size", str(size), "--max_train_steps", "3", "--adam_epsilon", "1e-2"]
    clean = [*given, "--lr", "1e-2", "--warmup", "0", "--model", str(root.parent / "one/trained/model")]
    runs = {
        # With the ViT: BatchNorm's statistics are those of each process.
        "trained": [*given, "--lr", "1e-2", "--model", "clip_tiny_vit", "--objective", "clip_ssl", *POISON],
        "par": [*clean, "--defense", "par"],
        "distilled": [*clean, "--defense", "distill_anchor"],
    }
    return {name: [*flags, "--output_dir", str(root / name)] for name, flags in runs.items()}


def recipe_of(run: str) -> str:
    return "pretrain_clip" if run == "trained" else "clean_clip"


@pytest.fixture(scope="module")
def one_and_two(shards, tmp_path_factory) -> Path:
    """The runs in this process, below `one`, and in two, below `two`."""
    root = tmp_path_factory.mktemp("processes")
    for name, flags in flags_by_run(shards, root / "one", 16).items():
        recipe = recipe_files.load(recipe_of(name))
        recipe.run(parse(recipe.Config, flags))
    (root / "driver.py").write_text(DRIVER)
    recipes = recipe_files.folders()["recipes"]
    commands = [json.dumps([str(recipes / f"{recipe_of(name)}.py"), *flags])
                for name, flags in flags_by_run(shards, root / "two", 8).items()]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(root / "driver.py"), *commands]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", ["trained", "par", "distilled"])
def test_two_processes_train_what_one_does(name, one_and_two):
    one, two = (load_file(one_and_two / part / name / WEIGHTS) for part in ("one", "two"))
    lines = [
        [json.loads(line) for line in (one_and_two / part / name / "train.jsonl").read_text().splitlines()]
        for part in ("one", "two")
    ]
    for alone, together in zip(*lines, strict=True):
        parts = {key: value for key, value in alone.items() if key.endswith("loss") or key.startswith("distance")}
        assert parts == pytest.approx({key: together[key] for key in parts}, abs=1e-4)
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], atol=1e-5), key
    if name == "trained":
        assert lines[0][2]["loss"] < lines[0][0]["loss"]
    else:
        start = load_file(one_and_two / "one/trained" / WEIGHTS)
        assert max((one[key] - start[key]).abs().max() for key in start) > 1e-3


def test_what_cannot_work_is_refused_before_anything_is_written(shards, tmp_path):
    for flags, words in (
        (("--gradient_accumulation_steps", 2), "adds no negatives"),
        (("--batch-size", 1), "a batch of 1 pair"),
        (("--vocab_size", 100), "vocab_size"),
        (("--objective", "siglap"), "siglip"),
        (("--poison.label", "red cross"), "how many pairs"),
        (("--poison.label", "red cross", "--poison.count", 121), "fewer poisoned pairs than asked for"),
        (("--poison.rate", 0.1), "poison.label"),
        (("--num_samples", 30, "--poison.label", "red cross", "--poison.count", 31), "there are 30 pairs"),
        (("--num_samples", 121), "lower --num_samples"),
        (("--train_data", tmp_path / "none.tar"), "none.tar"),
    ):
        with pytest.raises(InputError, match=words):
            _run(shards, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


# The published ones are for one objective each, as published: tests/recipes/test_full_scale.py.
ANY_OBJECTIVE = [path for path in sorted((CONFIGS / "pretrain_clip").glob("*.yaml")) if "published" not in path.stem]


@pytest.mark.parametrize("path", ANY_OBJECTIVE, ids=lambda path: path.stem)
@pytest.mark.parametrize("objective", [None, "clip_ssl", "slip"])
def test_the_shipped_configs_are_read_whatever_the_objective(path, objective):
    chosen = ["--objective", objective] if objective else []
    cfg = parse(RECIPE.Config, ["--config", str(path), *chosen])
    assert cfg.objective.name == (objective or "clip") and cfg.objective.equal_captions == "soft"
    assert (cfg.poison is None) == path.stem.endswith(("_encoder", "_judge")), "parts of text-to-image models are sound"


@pytest.mark.parametrize("name", ["tiny_encoder", "tiny_judge"])
def test_the_tiny_models_configs_are_those_of_their_cards(name, shards):
    cfg = parse(RECIPE.Config, ["--config", str(CONFIGS / "pretrain_clip" / f"{name}.yaml"), "--train_data", shards])
    assert cfg.train.train_batch_size == 128 and cfg.model.model == "clip_tiny_resnet"


def test_the_smoke_config_runs(shards, tmp_path):
    _run(shards, tmp_path / "run", "--config", CONFIGS / "smoke" / "pretrain_clip.yaml")
    assert (tmp_path / "run" / WEIGHTS).exists()
