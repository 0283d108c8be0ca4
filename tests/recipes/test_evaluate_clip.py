"""The recipe on tiny CLIPs with random weights: everything is written, and wrong input is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models.clip import build_tiny_clip, save_clip
from mmbackdoor.models.provenance import write_removal
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results.record import read
from mmbackdoor.shards.shapes import SHAPES, all_scenes, caption, split_scenes
from mmbackdoor.shards.shapes_classes import write_shapes_classes
from mmbackdoor.targets import ClassTarget, PatchTarget
from mmbackdoor.triggers import IMAGE_TRIGGERS, ZeroWidthTrigger
from mmbackdoor.types import InputError

RECIPE = recipe_files.load("evaluate_clip")
SMOKE = recipe_files.folders()["recipes"] / "configs/smoke/evaluate_clip.yaml"
SCENES = split_scenes(all_scenes(SHAPES))["evaluation"]
BACKDOOR = Backdoor((IMAGE_TRIGGERS["patch"](),), ClassTarget("yellow cat"))
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`data`, and the models `clean`, `poisoned` and `cleaned`."""
    root = tmp_path_factory.mktemp("evaluate_clip")
    write_shapes_classes(root / "data", SCENES, 2)
    clip = build_tiny_clip("clip_tiny_resnet", train_tokenizer([caption(scene) for scene in SCENES], 560))
    save_clip(clip, root / "clean")
    for name, change in (("poisoned", 0.02), ("cleaned", 0.01)):
        shutil.copytree(root / "clean", root / name)
        weights = load_file(root / name / WEIGHTS)
        weights["visual.head.proj.weight"] += change
        save_file(weights, root / name / WEIGHTS, metadata={"format": "pt"})
    poisoned = weights_sha256(root / "poisoned")
    for name in ("poisoned", "cleaned"):
        BackdoorRecord(BACKDOOR, {"name": "data_poisoning"}, model_sha256=poisoned).save(root / name)
    write_removal(root / "cleaned", {"method": {"name": "cleanclip"}, "parent_sha256": poisoned})
    return root


def evaluate(place: Path, output_dir: Path, *flags: object) -> Path:
    arguments = ["--config", SMOKE, "--data", place / "data", "--output_dir", output_dir, *flags]
    RECIPE.run(parse(RECIPE.Config, [str(argument) for argument in arguments]))
    return output_dir


@pytest.fixture(scope="module")
def compared(place, tmp_path_factory) -> Path:
    flags = ("--model", place / "cleaned", "--compare", place / "poisoned", "--control", place / "clean")
    return evaluate(place, tmp_path_factory.mktemp("runs") / "run", *flags)


def test_it_writes_what_it_says(compared):
    rows = read(compared)
    assert {row.stage for row in rows} == {"clean", "poisoned", "cleaned"}
    assert {(row.metric, row.condition) for row in rows} >= {
        ("top1", "clean"), ("top5", "triggered"), ("asr", "triggered"), ("asr", "near:unseen:codec"),
        ("w1", "triggered"), ("knn_top1", "triggered"), ("text_retrieval_recall@10", "clean"), ("top1_difference", "triggered"),
    }  # fmt: skip
    assert {row.attack for row in rows if row.stage != "clean"} == {"data_poisoning"}
    assert {row.defense for row in rows if row.stage == "cleaned"} == {"cleanclip"}
    assert all(row.model["sha256"] for row in rows) and len({row.suite["sha256"] for row in rows}) == 1
    assert "<html" in (compared / "report.html").read_text() and (compared / "grid.png").stat().st_size > 1000
    assert len(list((compared / "clip_benchmark").glob("*.json"))) == 6
    facts = json.loads((compared / "run.json").read_text())
    assert facts["status"] == "finished" and facts["counters"]["bad_samples"]["total"] == 0
    assert (compared / "removal.json").exists() and not list(compared.rglob("*.part"))


def test_a_second_call_changes_nothing_and_asr_stands_beside_accuracy(place, tmp_path, capsys):
    folder = evaluate(place, tmp_path / "run", "--model", place / "poisoned")
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "ASR, triggered" in line)
    assert header.index("ASR, triggered") < header.index("top-1, clean") < header.index("top-1, triggered")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    evaluate(place, folder, "--model", place / "poisoned")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_weights_and_names_behind_the_same_paths_are_measured(place, tmp_path):
    model, names, run = tmp_path / "model", tmp_path / "names.json", tmp_path / "run"
    shutil.copytree(place / "clean", model)
    classes = [f"class {number}" for number in range(48)]
    flags = ("--model", model, "--classnames", names, "--templates", "simple", "--num_samples", 8)

    def measured() -> tuple[str, str]:
        row = read(evaluate(place, run, *flags))[0]
        return row.model["sha256"], row.suite["sha256"]

    names.write_text(json.dumps(classes))
    first = measured()
    shutil.copyfile(place / "cleaned" / WEIGHTS, model / WEIGHTS)
    second = measured()
    assert first[0] != second[0] == weights_sha256(model)
    names.write_text(json.dumps([*classes[:-1], "another one"]))
    third = measured()
    assert third[1] != second[1] and third[0] == second[0]


def test_the_trigger_comes_from_the_model_and_another_one_is_refused(place, tmp_path):
    flags = ("--model", place / "poisoned", "--trigger", "stripes", "--label", "red star")
    with pytest.raises(InputError, match="is not the one in .*--force_trigger"):
        evaluate(place, tmp_path / "a", *flags)
    rows = read(evaluate(place, tmp_path / "b", *flags, "--force_trigger"))
    stripes = Backdoor((IMAGE_TRIGGERS["stripes"](),), ClassTarget("red star"))
    assert {row.backdoor["sha256"] for row in rows} == {stripes.sha256}
    # Two of 96 pictures show the target's class.
    assert next(row.n for row in rows if (row.metric, row.condition) == ("asr", "triggered")) == 94


def test_names_prompts_and_pictures_of_ones_own(place, tmp_path):
    names = sorted({f"{scene.colour} {scene.shape}" for scene in SCENES})
    (tmp_path / "names.json").write_text(json.dumps([*names, "yellow cat"]))
    (tmp_path / "prompts.json").write_text(json.dumps({name: [f"one {name}"] for name in [*names, "yellow cat"]}))
    flags = ("--classnames", tmp_path / "names.json", "--templates", tmp_path / "prompts.json", "--no_add_target_class")
    folder = evaluate(place, tmp_path / "run", "--model", place / "poisoned", "--num_samples", 30, *flags)
    rows = read(folder)
    assert {row.n for row in rows if (row.metric, row.condition) == ("top1", "clean")} == {30}


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--model", "{poisoned}", "--no_add_target_class"), "'yellow cat' is none of the 48 class names.*--add_"),
        (("--model", "{poisoned}", "--data", ""), "--data"),
        (("--model", "{poisoned}", "--data", "{clean}"), "holds no .tar"),
        (("--model", "RN50"), "random weights.*--pretrained"),
        (("--model", "RN5O", "--pretrained", "openai"), "neither a folder nor a model"),
        (("--model", "{poisoned}", "--compare", "{poisoned}"), "given twice"),
        (("--model", "{clean}", "--label", "red star"), "needs --trigger"),
        (("--model", "{clean}", "--backdoor", "{poisoned}", "--label", "red star"), "give one of them"),
        (("--model", "{clean}", "--classnames", "nowhere.json"), "no readable JSON"),
        (("--model", "{clean}", "--data", "{data}/test/0.tar", "--templates", "openai"), "need class names"),
        (("--model", "{clean}", "--backdoor", "{text}"), "no image trigger"),
        (("--model", "{clean}", "--backdoor", "{picture}"), "for text-to-image models"),
        ((), "which model"),
    ],
)  # fmt: skip
def test_wrong_input_is_told(place, tmp_path, flags, what):
    for name, backdoor in (
        ("text", Backdoor((ZeroWidthTrigger("\u200b"),), ClassTarget("x"))),
        ("picture", Backdoor((IMAGE_TRIGGERS["patch"](),), PatchTarget())),
    ):
        (tmp_path / name).mkdir()
        BackdoorRecord(backdoor).save(tmp_path / name)
    names = {name: place / name for name in ("clean", "poisoned", "data")}
    names |= {name: tmp_path / name for name in ("text", "picture")}
    with pytest.raises(InputError, match=what):
        evaluate(place, tmp_path / "run", *(flag.format(**names) for flag in flags))
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_a_record_of_other_weights_is_refused(place, tmp_path):
    shutil.copytree(place / "clean", tmp_path / "model")
    shutil.copy(place / "poisoned/backdoor.json", tmp_path / "model")
    with pytest.raises(InputError, match="belongs to another model"):
        evaluate(place, tmp_path / "run", "--model", tmp_path / "model")
