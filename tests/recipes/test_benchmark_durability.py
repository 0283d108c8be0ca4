"""Durability: every pick and its control are fine-tuned alike and measured, once; wrong input is refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.results import benchmark, durability
from mmbackdoor.types import Diverged, InputError
from tests.recipes.finished_benchmark import asked_for_more_seeds, finished_benchmark, stamps, with_a_poison_of_its_own

SMOKE = recipe_files.folders()["recipes"] / "configs/smoke/benchmark_durability.yaml"


@pytest.fixture(scope="module")
def recipe():
    return recipe_files.load("benchmark_durability")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finished_benchmark(tmp_path_factory)


def run(recipe, finished: Path, folder: Path, *flags: str) -> Path:
    given = ["--config", str(SMOKE), "--benchmark", str(finished), "--output_dir", str(folder), *flags]
    recipe.run(parse(recipe.Config, given))
    return folder


@pytest.fixture(scope="module")
def made(recipe, finished, tmp_path_factory) -> Path:
    return run(recipe, finished, tmp_path_factory.mktemp("durability"))


def told(place: Path, name: str) -> dict:
    return json.loads((place / name).read_text())


def test_every_pick_and_its_control_are_measured_in_every_situation(made, finished):
    lines = durability.read(made)
    assert [(one.objective, one.model, one.poison_pairs) for one in lines] == [
        ("cyclip", model, pairs) for model in (durability.NEVER, "cleanclip") for pairs in (None, 0, 2)
    ]
    points, _ = benchmark.read(finished)
    rule = recipe_files.settings_of(recipe_files.load("benchmark_objectives").Config, str(finished)).blind
    picks = {(one.objective, one.sha256, one.asr, one.step) for one in benchmark.picked(points, rule)}
    as_picked = [one for one in lines if one.cleaner and one.poison_pairs is None]
    assert {(one.objective, one.sha256, one.asr, one.step) for one in as_picked} == picks
    assert len({one.sha256 for one in lines}) == len(lines) and {one.n for one in lines} == {48}
    assert {(one.finetune_steps, one.finetune_epochs) for one in lines if one.poison_pairs is not None} == {(2, 1.0)}
    assert (made / "report.html").is_file() and (made / "durability.png").is_file() and (made / "table.md").is_file()


def test_fine_tuning_is_that_of_an_owner_with_the_same_poisoned_pairs_for_all(made, finished):
    [step] = {one.step for one in durability.read(made) if one.cleaner}
    picked = "cleanclip-lr0.001/" + ("model" if step == 2 else "models/step-1")
    for model, parent in (("clean", "clean/model"), ("cleanclip", picked)):
        place = made / "cyclip/seed-0" / model
        config = told(place / "pairs-2", "run.json")["config"]
        assert config["objective"]["name"] == "clip" and config["train"]["learning_rate"] == 2e-3
        assert config["model"]["model"] == str(finished / "cyclip/seed-0" / parent)
        assert config["train_data"] == f"{finished}/data/clean-*.tar" and config["poison"]["count"] == 2
        # What descends from a cleaned model says so, and does not call itself clean.
        names = ("backdoor.json", "removal.json")
        assert {(place / "pairs-0/model" / name).exists() for name in names} == {model != "clean"}
        assert ("clean testbed" in (place / "pairs-0/model/README.md").read_text()) == (model == "clean")
        assert not (place / "pairs-2/model/removal.json").exists()
        record = told(place / "pairs-2/model", "backdoor.json")
        assert record["attack"]["poisoned"] == 2 and record["seeds"] == {"seed": 0, "poison": 0}


def test_a_second_call_makes_what_is_missing_and_nothing_else(recipe, finished, made):
    kept = ("model", "results.jsonl")
    before = stamps(made, *kept)
    shutil.rmtree(made / "cyclip/seed-0/clean/pairs-0")
    run(recipe, finished, made)
    after = stamps(made, *kept)
    assert after.keys() == before.keys()
    changed = {Path(name).parent.parent.as_posix() for name in before if after[name] != before[name]}
    assert changed == {"cyclip/seed-0/clean/pairs-0"}


def test_a_fine_tuning_that_breaks_off_is_said_and_in_no_mean(recipe, finished, made, monkeypatch):
    stage = recipe_files.stage
    broken = str(made / "cyclip/seed-0/cleanclip/pairs-2")

    def breaking(name: str, *given: object) -> None:
        if name == "pretrain_clip" and str(given[-1]) == broken:
            raise Diverged("the loss is nan")
        stage(name, *given)

    monkeypatch.setattr(recipe_files, "stage", breaking)
    run(recipe, finished, made)
    assert len(durability.read(made)) == 5
    said = "cleanclip on cyclip: fine-tuning for 2 poison pairs broke off with seed 0."
    assert said in (made / "report.html").read_text()


def without_controls(folder: Path) -> None:
    points, trainings = benchmark.read(folder)
    benchmark.write(folder, [one for one in points if one.stage != "clean"], trainings)


def with_other_weights(folder: Path) -> None:
    weights = next((folder / "cyclip/seed-0/clean/model").glob("*.safetensors"))
    shutil.copyfile(next((folder / "cyclip/seed-0/poisoned/model").glob("*.safetensors")), weights)


@pytest.mark.parametrize(
    ("flags", "change", "said"),
    [
        (["--benchmark", ""], None, "which benchmark"),
        (["--benchmark", "/nowhere"], None, "no run has finished there"),
        (["--cleaners", "par"], None, "'par' is none of .*; choose from cleanclip"),
        (["--poison_pairs", "33"], None, "33 were, and there are 32 pairs"),
        (["--poison_pairs", "-1"], None, "poison_pairs"),
        (["--steps", "1"], "finetune: {lr_warmup_steps: 1}", "never comes to the learning rate"),
        ([], "finetune: {objective: clop}", "clop"),
        ([], "finetune: {learning_rat: 1}", "learning_rat"),
        ([], without_controls, "--control true"),
        ([], with_other_weights, "not the model that the benchmark measured"),
        ([], with_a_poison_of_its_own, r"gives 'cyclip' a poison of its own .poison.label."),
        ([], "finetune: {max_train_steps: 3}", "finetune.max_train_steps is not possible"),
        ([], asked_for_more_seeds, "no line of the poisoned model of 'cyclip' with seed 1"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(recipe, finished, tmp_path, flags, change, said):
    source = finished
    if callable(change):
        source = Path(shutil.copytree(finished, tmp_path / "benchmark"))
        change(source)
    (tmp_path / "settings.yaml").write_text(f"{change}\n" if isinstance(change, str) else "steps: 20\n")
    given = ["--benchmark", str(source)] if "--benchmark" not in flags else []
    config = ["--config", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "x")]
    with pytest.raises(InputError, match=said):
        recipe.run(parse(recipe.Config, [*config, *given, *flags]))
    assert not (tmp_path / "x").exists()
