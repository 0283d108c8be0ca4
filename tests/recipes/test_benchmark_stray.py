"""Stray poison: the shards have it, every filter is counted, all get as many trials; once, and checked early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.results import benchmark, stray
from mmbackdoor.types import InputError
from tests.recipes.finished_benchmark import asked_for_more_seeds, finished_benchmark, stamps, with_a_poison_of_its_own

SMOKE = recipe_files.folders()["recipes"] / "configs/smoke/benchmark_stray.yaml"


@pytest.fixture(scope="module")
def recipe():
    return recipe_files.load("benchmark_stray")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finished_benchmark(tmp_path_factory)


def run(recipe, finished: Path, folder: Path) -> Path:
    given = ["--config", str(SMOKE), "--benchmark", str(finished), "--output_dir", str(folder)]
    recipe.run(parse(recipe.Config, given))
    return folder


@pytest.fixture(scope="module")
def made(recipe, finished, tmp_path_factory) -> Path:
    return run(recipe, finished, tmp_path_factory.mktemp("stray"))


def test_all_are_cleaned_and_measured_in_as_many_trials(made, finished):
    points, trainings = benchmark.read(made)
    runs = [(one.cleaner, one.learning_rate, one.step) for one in points if one.stage == "cleaned"]
    names = (stray.NO_STRAYS, stray.UNFILTERED, "cosine")
    assert runs == [(name, 1e-3, step) for name in names for step in (1, 2)]
    assert len({one.sha256 for one in points}) == len(points) == 8
    there, _ = benchmark.read(finished)
    assert [one.asr for one in points[:4]] == [one.asr for one in there] and points[2].sha256 == there[2].sha256
    assert [(one.cleaner, one.pairs, one.steps) for one in trainings[2:]] == [
        (stray.NO_STRAYS, 32, 2), (stray.UNFILTERED, 32, 2), ("cosine", 24, 2)
    ]  # fmt: skip
    page = (made / "report.html").read_text()
    assert "cosine on cyclip: ASR" in page and (made / "stray.png").is_file() and (made / "table.md").is_file()


def test_the_strays_are_in_the_shards_and_the_filter_is_what_is_trained_without(made):
    poisoned = {json.loads(line)["key"] for line in (made / "data/seed-0/manifest.jsonl").read_text().splitlines()}
    dropped = set((made / "cyclip/seed-0/detect-cosine/dropped.txt").read_text().split())
    kept = set((made / "cyclip/seed-0/detect-cosine/kept.txt").read_text().split())
    assert len(poisoned) == 2 and len(dropped) == 8 and len(kept) == 24
    [found] = stray.read_filters(made)
    assert (found.pairs, found.strays, found.dropped, found.found) == (32, 2, 8, len(poisoned & dropped))
    assert found.auroc is not None
    for name, listed in (("cosine", 24), (stray.UNFILTERED, None)):
        removal = json.loads((made / f"cyclip/seed-0/{name}-lr0.001/model/removal.json").read_text())
        assert (removal["keep_keys"] or {}).get("used") == listed and removal["method"]["name"] == "cleanclip"
        config = json.loads((made / f"cyclip/seed-0/{name}-lr0.001/run.json").read_text())["config"]
        assert config["train_data"] == f"{made}/data/seed-0/*.tar" and config["train"]["lr_warmup_steps"] == 0


def test_a_second_call_makes_what_is_missing_and_nothing_else(recipe, finished, made):
    kept = ("model", "models", "results.jsonl", "sights.jsonl", "data", "scores.jsonl")
    before = stamps(made, *kept)
    shutil.rmtree(made / "cyclip/seed-0/cosine-lr0.001")
    run(recipe, finished, made)
    after = stamps(made, *kept)
    assert after.keys() == before.keys()
    assert {Path(name).parts[2] for name in before if after[name] != before[name]} == {"cosine-lr0.001"}


def poisoned_otherwise(folder: Path) -> None:
    weights = next((folder / "cyclip/seed-0/poisoned/model").glob("*.safetensors"))
    shutil.copyfile(next((folder / "cyclip/seed-0/clean/model").glob("*.safetensors")), weights)


@pytest.mark.parametrize(
    ("flags", "change", "said"),
    [
        ([], "count: 5", "which benchmark"),
        (["--benchmark", "/nowhere"], "count: 5", "no run has finished there"),
        (["--cleaner", "par"], None, "'par' is none of .*; choose from cleanclip"),
        (["--count", "33"], None, "33 were, and there are 32 pairs"),
        (["--resolution", "32"], None, "place input needs"),
        ([], "filters: {unfiltered: {detector: dao}}", "which the benchmark uses itself"),
        ([], "filters: {a/b: {detector: dao}}", "use letters"),
        ([], "filters: {nothing: {}}", "nothing"),
        ([], "filters: {dao: {drop_fraction: 2}}", "drop_fraction"),
        ([], poisoned_otherwise, "not the model that the benchmark measured"),
        ([], with_a_poison_of_its_own, r"gives 'cyclip' a poison of its own .poison.label."),
        ([], "filters: {dao: {seed: 3}}", "filters.dao.seed is not possible"),
        ([], asked_for_more_seeds, "no line of the poisoned model of 'cyclip' with seed 1"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(recipe, finished, tmp_path, flags, change, said):
    source = finished
    if callable(change):
        source = Path(shutil.copytree(finished, tmp_path / "benchmark"))
        change(source)
    (tmp_path / "settings.yaml").write_text(f"{change}\n" if isinstance(change, str) else "count: 2\n")
    given = [] if change == "count: 5" else ["--benchmark", str(source)]
    config = ["--config", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "x")]
    with pytest.raises(InputError, match=said):
        recipe.run(parse(recipe.Config, [*config, *given, *flags]))
    assert not (tmp_path / "x").exists()
