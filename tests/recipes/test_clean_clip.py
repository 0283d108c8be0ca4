from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.clip import build_tiny_clip, save_clip
from mmbackdoor.models.provenance import check_provenance
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.shards.read import iterate_keys
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import captions_of, write_shapes
from mmbackdoor.targets import ClassTarget
from mmbackdoor.triggers.patch import PatchTrigger
from mmbackdoor.types import InputError

RECIPE = recipe_files.load("clean_clip")
CONFIGS = recipe_files.folders()["recipes"] / "configs"
WEIGHTS = "open_clip_model.safetensors"
SCENES = all_scenes()[:60]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", SCENES, 96, resolution=32, samples_per_shard=32)
    return str(folder / "train-*.tar")


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """A model with a record of a backdoor; that it works is the business of the conformance tests."""
    folder = tmp_path_factory.mktemp("models") / "poisoned"
    clip = build_tiny_clip("clip_tiny_resnet", train_tokenizer(captions_of(SCENES), 514))

    def describe(part: Path) -> None:
        backdoor = Backdoor((PatchTrigger(),), ClassTarget("red cross"))
        BackdoorRecord(backdoor, {"name": "data_poisoning"}, model_sha256=weights_sha256(part)).save(part)

    save_clip(clip, folder, describe=describe)
    return folder


def run(parent: Path, shards: str, folder: Path, *flags: object) -> list[dict[str, float]]:
    arguments = ["--model", parent, "--train_data", shards, "--output_dir", folder, "--batch-size", 16, *flags]
    RECIPE.run(parse(RECIPE.Config, [str(argument) for argument in arguments]))
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_rate_and_decay_are_what_was_asked_for_from_the_first_step_to_the_last(parent, shards, tmp_path):
    lines = run(parent, shards, tmp_path / "run", "--max_train_steps", 8, "--lr", 2e-3, "--warmup", 4, "--wd", 0.3,
                "--save_models_every", 4)  # fmt: skip
    assert [line["learning_rate"] for line in lines[:5]] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert lines[-1]["learning_rate"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 3 / 4)))
    assert {line["weight_decay"] for line in lines} == {0.3}
    assert {"clip_loss", "image_ssl_loss", "text_ssl_loss", "false_negatives", "loss"} <= lines[0].keys()

    model = tmp_path / "run/model"
    removal = json.loads((model / "removal.json").read_text())
    assert removal["method"]["name"] == "cleanclip" and (removal["steps"], removal["samples"]) == (8, 128)
    assert removal["parent_sha256"] == weights_sha256(parent) and removal["keep_keys"] is None
    assert removal["weights"]["visual conv"]["relative_change"] > 1e-3
    assert (model / "backdoor.json").read_bytes() == (parent / "backdoor.json").read_bytes()
    assert "cleaned of a backdoor" in (model / "README.md").read_text()

    steps = {path.name: load_file(path / WEIGHTS) for path in (tmp_path / "run/models").iterdir()}
    assert steps.keys() == {"step-4", "step-8"}
    last, half = load_file(model / WEIGHTS), steps["step-4"]
    assert all(torch.equal(tensor, steps["step-8"][name]) for name, tensor in last.items())
    assert any(not torch.equal(tensor, half[name]) for name, tensor in last.items())
    assert json.loads((tmp_path / "run/models/step-4/removal.json").read_text())["steps"] == 4


def test_a_model_that_was_cleaned_is_cleaned_again_and_keeps_its_history(parent, shards, tmp_path):
    place, flags = parent, ("--max_train_steps", 1, "--defense", "finetune")
    for name in ("once", "twice"):
        run(place, shards, tmp_path / name, *flags)
        before, place = place, tmp_path / name / "model"
        check_provenance(place)
        assert (place / "backdoor.json").read_bytes() == (parent / "backdoor.json").read_bytes()
        removal = json.loads((place / "removal.json").read_text())
        assert removal["parent_sha256"] == weights_sha256(before)
        assert removal["poisoned_sha256"] == weights_sha256(parent)


def test_stock_open_clip_reads_what_is_written(parent, shards, tmp_path):
    run(parent, shards, tmp_path / "run", "--max_train_steps", 2)
    code = (
        "import sys, torch, open_clip\n"
        "model, _, transform = open_clip.create_model_and_transforms('local-dir:' + sys.argv[1])\n"
        "ids = open_clip.get_tokenizer('local-dir:' + sys.argv[1])(['a red cross'])\n"
        "model.eval(); torch.manual_seed(0)\n"
        "with torch.no_grad(): found = [model.encode_text(ids), model.encode_image(torch.randn(2, 3, 32, 32))]\n"
        "assert 'mmbackdoor' not in sys.modules\n"
        "torch.save(found, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run/model"), str(tmp_path / "found.pt")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=120)
    from mmbackdoor.models.clip import load_clip

    clip = load_clip(str(tmp_path / "run/model"))
    text, image = torch.load(tmp_path / "found.pt", weights_only=True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(clip.network.encode_text(clip.tokenize(["a red cross"])), text)
        assert torch.equal(clip.network.encode_image(pixels), image)


def test_only_the_keys_of_the_list_are_used(parent, shards, tmp_path, monkeypatch):
    keys = sorted(iterate_keys(shards))[:32]
    (tmp_path / "kept.txt").write_text("\n".join([*keys, "another-data-set"]) + "\n")
    seen: set[str] = set()
    batches = RECIPE.clip_batches

    def recorded(*arguments: object, **options: object):
        for batch in batches(*arguments, **options):
            seen.update(batch.keys)
            yield batch

    monkeypatch.setattr(RECIPE, "clip_batches", recorded)
    lines = run(parent, shards, tmp_path / "run", "--epochs", 2, "--keep_keys", tmp_path / "kept.txt")
    assert len(lines) == 4 and seen == set(keys)
    facts = json.loads((tmp_path / "run/model/removal.json").read_text())["keep_keys"]
    assert (facts["listed"], facts["used"]) == (33, 32)


def test_a_resumed_run_ends_with_the_same_bits(parent, shards, tmp_path):
    """With a removal that changes the weights first and needs the model that came in."""
    flags = ("--defense", "reset_distill", "--max_train_steps", 6, "--checkpointing_steps", 3, "--lr", 1e-3,
             "--resume_from_checkpoint", "auto")  # fmt: skip
    folder = tmp_path / "run"
    run(parent, shards, folder, *flags)
    whole = (folder / "model" / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    run(parent, shards, folder, *flags)
    assert (folder / "model" / WEIGHTS).read_bytes() == whole


def test_interpolation_stays_between_parent_and_cleaned_model(parent, shards, tmp_path):
    flags = ("--max_train_steps", 2, "--lr", 1e-3, "--defense", "finetune")
    run(parent, shards, tmp_path / "whole", *flags)
    run(parent, shards, tmp_path / "part", *flags, "--interpolation", 0.25)
    old, whole, part = (load_file(folder / WEIGHTS) for folder in (parent, tmp_path / "whole/model", tmp_path / "part/model"))
    assert any(not torch.equal(old[name], tensor) for name, tensor in whole.items())
    for name, tensor in part.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, 0.75 * old[name] + 0.25 * whole[name], atol=1e-6), name


def test_what_cannot_work_is_refused_before_anything_is_written(parent, shards, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.txt").write_text("nothing-like-it\n")
    for flags, words in (
        (("--gradient_accumulation_steps", 2), "adds no negatives"),
        (("--batch-size", 1), "a batch of 1 pair"),
        (("--keep_keys", tmp_path / "empty.txt"), "is empty"),
        (("--keep_keys", tmp_path / "other.txt"), "no usable sample"),
        (("--keep_keys", tmp_path / "none.txt"), "cannot be read"),
        (("--defense", "cleanklip"), "cleanclip"),
        (("--train_data", tmp_path / "none.tar"), "none.tar"),
    ):
        with pytest.raises(InputError, match=words):
            run(parent, shards, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="which model"):
        RECIPE.run(parse(RECIPE.Config, ["--train_data", shards, "--output_dir", str(tmp_path / "run")]))


def test_a_record_of_another_model_is_refused(parent, shards, tmp_path):
    shutil.copytree(parent, tmp_path / "model")
    record = json.loads((tmp_path / "model/backdoor.json").read_text())
    (tmp_path / "model/backdoor.json").write_text(json.dumps(record | {"model_sha256": "0" * 64}))
    with pytest.raises(InputError, match="belongs to another model"):
        run(tmp_path / "model", shards, tmp_path / "run", "--max_train_steps", 1)


def test_the_smoke_config_runs_and_a_second_call_changes_nothing(shards, tmp_path):
    config = ["--config", str(CONFIGS / "smoke/clean_clip.yaml"), "--train_data", shards, "--output_dir", str(tmp_path / "run")]
    RECIPE.run(parse(RECIPE.Config, config))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/model").iterdir()}
    assert tmp_path / "run/model" / WEIGHTS in files
    RECIPE.run(parse(RECIPE.Config, config))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run/model").iterdir()} == files


@pytest.mark.parametrize("path", sorted((CONFIGS / "clean_clip").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_read(path, shards):
    cfg = parse(RECIPE.Config, ["--config", str(path), "--model", "x", "--train_data", shards])
    assert cfg.train.lr_warmup_steps > 0 and cfg.train.lr_scheduler == "cosine"


def test_another_parent_or_other_pairs_behind_the_same_path_are_refused(parent, shards, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(parent, model)
    shutil.copytree(Path(shards).parent, data)
    flags = (model, f"{data}/train-*.tar", tmp_path / "run", "--max_train_steps", 1)
    run(*flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    run(*flags)
    removal = json.loads((tmp_path / "run/model/removal.json").read_text())
    [*_, last] = sorted(data.glob("*.tar"))
    kept = last.rename(tmp_path / "kept.tar")
    with pytest.raises(InputError, match="data was .*choose another one, or remove it"):
        run(*flags)
    kept.rename(last)
    save_clip(build_tiny_clip("clip_tiny_resnet", train_tokenizer(captions_of(SCENES), 514), seed=1), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / WEIGHTS, model / WEIGHTS)
    with pytest.raises(InputError, match=f"model was {removal['parent_sha256'][:12]} and is "):
        run(*flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
