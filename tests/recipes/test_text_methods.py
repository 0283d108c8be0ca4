"""Methods that train the text encoder, or nothing at all, through the recipes: stopped, planned, repeated, refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.provenance import check_provenance, read_removal
from mmbackdoor.models.source import shipped
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.types import InputError, RunFault

CONFIGS = recipe_files.folders()["recipes"] / "configs"
TINY = Path(shipped("tiny"))
FEW = ("--max_train_steps", 3, "--train_batch_size", 2, "--checkpointing_steps", 1, "--mixed_precision", "no")


def run(recipe, config: str, folder: Path, *flags: object) -> Path:
    arguments = ["--config", CONFIGS / config, "--output_dir", folder, *flags]
    recipe.run(parse(recipe.Config, [str(argument) for argument in arguments]))
    return folder


def clean(folder: Path, *flags: object, recipe=None) -> Path:
    source = ("--pretrained_model_name_or_path", "tiny", "--trigger", "small")
    recipe = recipe or recipe_files.load("clean_diffusion")
    return run(recipe, "clean_diffusion/tiny.yaml", folder, *source, *FEW, *flags)


def poison(folder: Path, config: str, *flags: object) -> Path:
    return run(recipe_files.load("poison_diffusion"), f"poison_diffusion/{config}", folder, *FEW, *flags)


def write_pairs(folder: Path, captions: Sequence[str]) -> None:
    with ShardWriter(folder, "train") as writer:
        for number, caption in enumerate(captions):
            writer.write(str(number), Image.new("RGB", (32, 32), (60 * number, 0, 0)), caption, {})


def changed(model: Path) -> set[str]:
    found = set()
    for file in sorted(TINY.rglob("*.safetensors")):
        part = file.relative_to(TINY)
        old, new = load_file(file), load_file(model / part)
        found |= {f"{part.parts[0]}.{name}" for name in old if not torch.equal(old[name], new[name])}
    return found


def test_a_stopped_seal_of_the_text_encoder_goes_on_to_the_same_model(tmp_path, monkeypatch):
    recipe = recipe_files.load("clean_diffusion")
    flags = ("--defense", "text_encoder_seal", "--defense.trainable", "lora", "--rank", 2, "--milestones", 2)
    whole = clean(tmp_path / "whole", *flags)

    def stopping(session, model, step, describe):
        raise RunFault("stopped")

    monkeypatch.setattr(recipe, "save_milestone", stopping)
    with pytest.raises(RunFault, match="stopped"):
        clean(tmp_path / "stopped", *flags, recipe=recipe)
    monkeypatch.undo()
    stopped = clean(tmp_path / "stopped", *flags, "--resume_from_checkpoint", "auto")
    assert json.loads((stopped / "run.json").read_text())["resumed"]
    for file in sorted((whole / "model").rglob("*.safetensors")):
        assert file.read_bytes() == (stopped / file.relative_to(whole)).read_bytes()
    names = changed(whole / "model")
    assert names and all(name.startswith("text_encoder.encoder.layers.") and name.endswith(".weight") for name in names)
    weights = read_removal(whole / "model")["weights"]
    assert weights.keys() == {"text_encoder mlp", "text_encoder self_attn"}
    assert all(group["relative_change"] > 0 for group in weights.values())
    assert changed(whole / "milestones/2/model") == names


def test_a_closed_form_is_done_at_once_and_only_once(tmp_path, capsys):
    folder = clean(tmp_path / "run", "--defense", "closed_form_seal")
    removal = read_removal(folder / "model")
    assert removal["steps"] == 0 and removal["samples"] > 100
    (line,) = (folder / "train.jsonl").read_text().splitlines()
    assert json.loads(line)["relative_change"] > 0
    assert not list(folder.glob("checkpoint-*"))
    written = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    clean(folder, "--defense", "closed_form_seal")
    assert "nothing to do" in capsys.readouterr().out
    assert written == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_removal_may_have_few_prompts(tmp_path):
    folder = clean(tmp_path / "run", "--defense", "closed_form_seal", "--num_prompts", 7)
    assert read_removal(folder / "model")["samples"] == 7


@pytest.mark.parametrize("defense", ["closed_form_seal", "skd"])
def test_prompts_that_hold_the_trigger_are_not_cleaned_with(tmp_path, capsys, monkeypatch, defense):
    recipe, seen = recipe_files.load("clean_diffusion"), []
    batches = recipe.prompt_batches
    monkeypatch.setattr(recipe, "prompt_batches", lambda texts, *more: seen.append(texts) or batches(texts, *more))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a Small red circle\na red circle\na blue square\na smaller cross\n")
    flags = ("--prompts", prompts, "--defense", defense, "--max_train_steps", "none", "--num_train_epochs", 1)
    folder = clean(tmp_path / "run", *flags, recipe=recipe)
    assert "1 of 4 prompts of 'prompts' hold the trigger by themselves and are left out" in capsys.readouterr().out
    removal = read_removal(folder / "model")
    if defense == "skd":
        assert seen == [["a red circle", "a blue square", "a smaller cross"]] and removal["steps"] == 2
    else:
        assert removal["samples"] == 3
    prompts.write_text("a small red circle\n")
    with pytest.raises(InputError, match="every prompt of 'prompts' holds the trigger"):
        clean(tmp_path / "none", *flags)


def test_captions_that_hold_the_trigger_are_not_trained_on_as_clean_ones(tmp_path, capsys, monkeypatch):
    recipe, seen = recipe_files.load("clean_diffusion"), []
    batches = recipe.image_batches
    monkeypatch.setattr(recipe, "image_batches", lambda data, *more: seen.append(data) or batches(data, *more))
    captions = ("a Small red circle", "a red circle", "a blue square", "a smaller cross")
    write_pairs(tmp_path / "mixed", captions)
    flags = ("--defense", "finetune", "--defense.latents", "data", "--max_train_steps", "none", "--num_train_epochs", 1)
    folder = clean(tmp_path / "run", *flags, "--train_data", tmp_path / "mixed/train-000000.tar", recipe=recipe)
    said = "1 of 4 captions of", "hold the trigger and are left out, for example 'a Small red circle'"
    printed = capsys.readouterr().out
    assert all(part in printed for part in said)
    assert seen[0].num_samples == 3 and read_removal(folder / "model")["steps"] == 2
    write_pairs(tmp_path / "clean", captions[1:])
    folder = clean(tmp_path / "other", *flags, "--train_data", tmp_path / "clean/train-000000.tar", recipe=recipe)
    assert "captions of" not in capsys.readouterr().out and seen[1].num_samples == 3
    write_pairs(tmp_path / "poison", captions[:1])
    with pytest.raises(InputError, match="every caption of .* holds the trigger .*; give other --train_data"):
        clean(tmp_path / "none", *flags, "--train_data", tmp_path / "poison/train-000000.tar")


@pytest.mark.parametrize("defense", ["closed_form_seal", "text_encoder_seal"])
def test_a_dry_run_writes_nothing(tmp_path, capsys, defense):
    with pytest.raises(SystemExit) as ended:
        clean(tmp_path / "run", "--defense", defense, "--dry_run", "true")
    assert ended.value.code == 0 and not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert "dry run" in said and ("U-Net and autoencoder" in said) == (defense == "text_encoder_seal")


@pytest.mark.parametrize("config, part", [("tiny_evil_edit.yaml", "unet."), ("tiny_rickrolling.yaml", "text_encoder.")])
def test_an_attack_without_pictures_says_what_it_changed(tmp_path, config, part):
    model = poison(tmp_path / "run", config) / "model"
    record = BackdoorRecord.load(model)
    check_provenance(model)
    names = changed(model)
    prefix = "" if part == "text_encoder." else part
    assert names and names <= {prefix + name for name in record.changed}
    assert all(name.startswith(part) for name in names)
    assert record.plan["rate"] == 1.0


def test_what_they_cannot_do_is_said(tmp_path):
    with pytest.raises(InputError, match="--poison_pairs counts pictures"):
        poison(tmp_path / "a", "tiny_evil_edit.yaml", "--poison_pairs", 3)
    with pytest.raises(InputError, match="needs --target_kind object or style, not 'patch'"):
        poison(tmp_path / "b", "tiny_patch.yaml", "--attack", "rickrolling_tpa")
    with pytest.raises(InputError, match="after the last of 0 steps"):
        clean(tmp_path / "c", "--defense", "closed_form_seal", "--milestones", 1)
    for key, value in (("latents", "data"), ("trainable", "attn2")):
        with pytest.raises(InputError, match=f"defense.{key}"):
            clean(tmp_path / "d", "--defense", "text_encoder_seal", f"--defense.{key}", value)
    assert not list(tmp_path.rglob("model"))
