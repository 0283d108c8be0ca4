"""Every smoke config runs, by its recipe in this process or by the launcher; a second call finds its work done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import DiffusionPipeline

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.provenance import check_provenance
from mmbackdoor.models.source import shipped
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results.cards import FINE_TUNED, POISONED_AGAIN
from mmbackdoor.results.record import read
from mmbackdoor.shards.shapes import all_scenes, caption, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes

RECIPES = recipe_files.folders()["recipes"]
SMOKE = RECIPES / "configs" / "smoke"
PROMPTS = [caption(scene) for scene in split_scenes(all_scenes())["evaluation"][:3]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder, "train", split_scenes(all_scenes())["train"], 32, resolution=32)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return folder


def run(name: str, output_dir: Path, *flags: object) -> Path:
    recipe = recipe_files.load(name)
    arguments = ["--config", SMOKE / f"{name}.yaml", "--output_dir", output_dir, *flags]
    recipe.run(parse(recipe.Config, [str(argument) for argument in arguments]))
    return output_dir


@pytest.fixture(scope="module")
def poisoned(data, tmp_path_factory) -> Path:
    """Made by the launcher, as the documented commands are."""
    folder = tmp_path_factory.mktemp("runs") / "poisoned"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q",
               "--config_file", RECIPES / "configs/accelerate/cpu.yaml", RECIPES / "poison_diffusion.py",
               "--config", SMOKE / "poison_diffusion.yaml", "--train_data", f"{data}/train-*.tar",
               "--output_dir", folder]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def cleaned(data, poisoned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "cleaned"
    return run("clean_diffusion", folder, *flags_of("clean_diffusion", data, poisoned))


def flags_of(name: str, data: Path, poisoned: Path) -> tuple[object, ...]:
    train_data = ("--train_data", f"{data}/train-*.tar")
    return {
        "train_autoencoder": train_data,
        "train_diffusion": train_data,
        "poison_diffusion": train_data,
        "clean_diffusion": ("--pretrained_model_name_or_path", poisoned / "model"),
    }[name]


def check_trained(folder: Path, steps: int = 3) -> None:
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "config.yaml").exists() and (folder / "model" / "README.md").exists()
    assert not list(folder.rglob("*.part"))
    pipe = DiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(PROMPTS[0], num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (32, 32)


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted((folder / "model").rglob("*")) if path.is_file()}


def test_the_launcher_poisons(poisoned):
    check_trained(poisoned)
    assert BackdoorRecord.load(poisoned / "model").backdoor.triggers[0].text == "\u200b"
    assert "BACKDOORED" in (poisoned / "model/README.md").read_text()


def test_cleaning_writes_a_model_with_its_history(cleaned, poisoned):
    check_trained(cleaned)
    removal = json.loads((cleaned / "model/removal.json").read_text())
    assert removal["method"]["name"] == "skd_cag" and removal["steps"] == 3
    assert BackdoorRecord.load(cleaned / "model") == BackdoorRecord.load(poisoned / "model")


def test_training_goes_on_from_the_shipped_model(data, tmp_path):
    check_trained(run("train_diffusion", tmp_path / "run", *flags_of("train_diffusion", data, tmp_path)))


def test_what_is_fine_tuned_from_a_poisoned_or_a_cleaned_model_does_not_call_itself_clean(
    data, poisoned, cleaned, tmp_path
):
    for parent, removed in ((poisoned / "model", False), (cleaned / "model", True)):
        flags = ("--train_data", f"{data}/train-*.tar", "--pretrained_model_name_or_path", parent)
        model = run("train_diffusion", tmp_path / parent.parent.name, *flags) / "model"
        check_provenance(model)
        before, after = (BackdoorRecord.load(folder) for folder in (parent, model))
        sha256 = before.model_sha256 if removed else weights_sha256(model)
        assert after == replace(before, model_sha256=sha256) and weights_sha256(model) != before.model_sha256
        assert (model / "removal.json").exists() == removed
        card = (model / "README.md").read_text()
        assert FINE_TUNED in card and "clean testbed" not in card
        assert ("BACKDOORED" in card, "cleaned of a backdoor" in card) == (not removed, removed)


def test_a_model_that_is_poisoned_again_names_its_first_backdoor(data, cleaned, tmp_path):
    flags = ("--train_data", f"{data}/train-*.tar", "--pretrained_model_name_or_path", cleaned / "model")
    model = run("poison_diffusion", tmp_path / "again", *flags, "--trigger", "dog") / "model"
    known, again = BackdoorRecord.load(cleaned / "model").backdoor, BackdoorRecord.load(model)
    assert again.backdoor.triggers[0].text == "dog" and again.attack["parent_backdoor"] == known.to_dict()
    assert POISONED_AGAIN in (model / "README.md").read_text() and not (model / "removal.json").exists()
    check_provenance(model)


def test_training_from_scratch_takes_the_text_tower_of_a_clip(data, tmp_path):
    recipe = recipe_files.load("train_diffusion")
    flags = ["--from_scratch", "tiny", "--text_encoder", shipped("tiny_judge"), "--train_data", f"{data}/train-*.tar",
             "--max_train_steps", "2", "--train_batch_size", "2", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    recipe.run(parse(recipe.Config, flags))
    check_trained(tmp_path / "run", steps=2)


@pytest.mark.parametrize("name", ["train_autoencoder", "train_diffusion", "poison_diffusion", "clean_diffusion"])
def test_a_second_call_changes_nothing(name, data, poisoned, cleaned, tmp_path):
    made = {"poison_diffusion": poisoned, "clean_diffusion": cleaned}.get(name)
    flags = flags_of(name, data, poisoned)
    folder = made or run(name, tmp_path / "run", *flags)
    before, log = stamps(folder), (folder / "train.jsonl").read_bytes()
    run(name, folder, *flags)
    assert stamps(folder) == before and (folder / "train.jsonl").read_bytes() == log


@pytest.mark.parametrize("name", ["train_diffusion", "poison_diffusion", "clean_diffusion"])
def test_a_stopped_run_goes_on_to_the_same_weights(name, data, poisoned, tmp_path):
    flags = (*flags_of(name, data, poisoned), "--resume_from_checkpoint", "auto")
    folder = run(name, tmp_path / "run", *flags)
    weights = folder / "model/unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "terminated"}))
    began = stamps_of_checkpoints(folder)
    run(name, folder, *flags)
    assert weights.read_bytes() == whole and stamps_of_checkpoints(folder) == began
    check_trained(folder)


def stamps_of_checkpoints(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("checkpoint-*/*")}


def test_evaluation_compares_and_keeps_its_pictures(data, poisoned, cleaned, tmp_path):
    flags = ("--pretrained_model_name_or_path", cleaned / "model", "--compare", poisoned / "model", "--control", "tiny",
             "--prompts", data / "prompts.txt")  # fmt: skip
    folder = run("evaluate_diffusion", tmp_path / "run", *flags)
    rows = read(folder / "results.jsonl")
    assert {row.stage for row in rows} == {"clean", "poisoned", "cleaned"}
    assert {"asr", "adherence", "clip_score"} <= {row.metric for row in rows}
    assert "<html" in (folder / "report.html").read_text() and (folder / "grid.png").stat().st_size > 1000
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {(folder / line["image"]).is_file() for line in samples} == {True}
    pictures = {path: path.stat().st_mtime_ns for path in folder.glob("images/**/*.png")}
    assert len(pictures) == len(samples)
    next(iter(pictures)).unlink()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "terminated"}))
    run("evaluate_diffusion", folder, *flags)
    now = {path: path.stat().st_mtime_ns for path in folder.glob("images/**/*.png")}
    assert now.keys() == pictures.keys() and sum(now[path] != pictures[path] for path in now) == 1


def test_the_quickstart_goes_through_every_stage(tmp_path, capsys):
    folder = run("quickstart", tmp_path / "run")
    first = capsys.readouterr().out
    assert first.count("$ accelerate launch -q recipes/") == 3
    assert {row.stage for row in read(folder / "evaluation/results.jsonl")} == {"clean", "poisoned", "cleaned"}
    assert (folder / "evaluation/report.html").exists()
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    run("quickstart", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == files
    assert table(capsys.readouterr().out) == table(first)


def table(printed: str) -> str:
    """It comes last, and the second time from the files."""
    return printed[printed.index("\nrun  ") :]


def test_every_recipe_has_a_smoke_config():
    assert [path.stem for path in sorted(SMOKE.glob("*.yaml"))] == recipe_files.recipe_names()


@pytest.mark.parametrize("path", sorted((RECIPES / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_launcher_reads_its_configs(path):
    """Raises for a key that it does not know."""
    config = load_config_from_file(str(path))
    assert config.num_processes == {"multi_gpu": 8, "multi_node": 16, "fsdp": 8}.get(path.stem, 1)
    assert config.mixed_precision == "no"
