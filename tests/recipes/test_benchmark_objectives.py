"""The benchmark of objectives: every stage once, what is finished is not made again, wrong grids are refused early."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.evaluate import clip_points
from mmbackdoor.results import benchmark
from mmbackdoor.types import Diverged, InputError, RunFault

CONFIGS = recipe_files.folders()["recipes"] / "configs"
SMOKE = CONFIGS / "smoke" / "benchmark_objectives.yaml"


@pytest.fixture(scope="module")
def recipe():
    return recipe_files.load("benchmark_objectives")


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "benchmark"
    recipe.run(parse(recipe.Config, ["--config", str(SMOKE), "--output_dir", str(folder)]))
    return folder


def stamps(folder: Path) -> dict[str, int]:
    kept = ("model", "models", "results.jsonl", "sights.jsonl", "data")
    files = [path for path in folder.rglob("*") if path.is_file() and set(path.relative_to(folder).parts) & set(kept)]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_every_model_is_measured_and_seen(made):
    points, trainings = benchmark.read(made)
    steps = [(one.objective, one.stage, one.cleaner, one.step) for one in points]
    assert steps == [
        (objective, *one)
        for objective in ("clip", "clip_ssl")
        for one in (("poisoned", None, 0), ("cleaned", "finetune", 1), ("cleaned", "finetune", 2),
                    ("cleaned", "strong", 1), ("cleaned", "strong", 2))
    ]  # fmt: skip
    assert len({one.sha256 for one in points}) == len(points) and {one.n for one in points} == {48}
    assert all(0 <= one.utility <= 1 and (one.drift > 1e-6) == (one.stage == "cleaned") for one in points)
    assert [(one.steps, one.samples_seen, one.pairs) for one in trainings[:2]] == [(3, 48, 48), (2, 16, 32)]
    assert {one.status for one in trainings} == {"finished"}
    assert (made / "report.html").is_file() and (made / "scatter.png").is_file()
    assert not list(made.rglob("*.part"))


def test_lines_of_the_grid_reach_their_recipe(made):
    strong = json.loads((made / "clip/seed-0/strong-lr0.001/model/removal.json").read_text())
    assert strong["method"]["name"] == "cleanclip" and strong["method"]["augmentation"] == "strong"
    plain = json.loads((made / "clip/seed-0/finetune-lr0.001/run.json").read_text())
    assert plain["config"]["defense"]["name"] == "finetune" and plain["config"]["train"]["learning_rate"] == 1e-3
    objectives = [
        json.loads((made / name / "seed-0/poisoned/run.json").read_text())["config"] for name in ("clip", "clip_ssl")
    ]
    assert [one["objective"]["name"] for one in objectives] == ["clip", "clip_ssl"]
    assert [one["train"]["max_train_steps"] for one in objectives] == [3, 2]


def test_a_variant_of_a_cleaner_is_one_in_force_and_the_table_says_so(made):
    _, trainings = benchmark.read(made)
    cleaned = {one.cleaner: one for one in trainings if (one.objective, one.stage) == ("clip", "cleaned")}
    strong, plain = cleaned["strong"], cleaned["finetune"]
    assert (strong.weight_decay, strong.steps_to_peak, strong.peak_rate) == (1.0, 1, 1e-3)
    # Of a warm-up of 50 steps there were two.
    assert (plain.weight_decay, plain.steps_to_peak) == (0.1, 2) and plain.peak_rate == pytest.approx(2e-3 / 50)
    assert all(one.false_negatives is not None for one in trainings)
    table = (made / "table.md").read_text()
    assert "| clip, strong | 32 | 8 | 2 | 0.5 | 0.001 | 1 | 1 |" in table
    assert "never had the rate that they are named after (clip, seed 0, finetune: 4e-05, not 0.001;" in table
    assert "false negatives, %" in table and (made / "picks.png").is_file()


def test_other_cleaners_of_the_same_models_need_no_more_than_their_lines(recipe, made, tmp_path):
    before = stamps(made)
    grid = f"models_from: {made}\nobjectives: {{clip: {{}}}}\ncontrol: false\nblind: best_utility\n"
    grid += "cleaners: {decay: {defense: finetune, train.adam_weight_decay: 10.0}}\nlearning_rates: [1.0e-3]\n"
    (tmp_path / "grid.yaml").write_text(grid)
    flags = ["--config", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "other")]
    recipe.run(parse(recipe.Config, flags))
    points, trainings = benchmark.read(tmp_path / "other")
    there, _ = benchmark.read(made)
    assert points[0] == there[0] and [(one.cleaner, one.step) for one in points[1:]] == [("decay", 1), ("decay", 2)]
    assert trainings[1].weight_decay == 10.0 and trainings[1].batch_size == 8
    assert stamps(made) == before and not (tmp_path / "other/clip/seed-0/poisoned").exists()
    for given, control in (("", False), ("control: false\n", False), ("control: true\n", True)):
        (tmp_path / "control.yaml").write_text(grid.replace("control: false\n", given))
        cfg = recipe.completed(parse(recipe.Config, ["--config", str(tmp_path / "control.yaml")]))
        assert cfg.control is control, "what is given, else what the models there were made with"
    # One that was trained otherwise is not taken for the same.
    (tmp_path / "grid.yaml").write_text(grid.replace("clip: {}", "clip: {train.learning_rate: 0.5}"))
    with pytest.raises(InputError, match="another train.learning_rate"):
        recipe.run(parse(recipe.Config, flags))


def test_different_lengths_are_warned_of(made):
    assert "different numbers of samples seen (clip 48, clip_ssl 32)" in (made / "report.html").read_text()


def test_a_second_call_makes_what_is_missing_and_nothing_else(recipe, made, capsys, monkeypatch):
    before = stamps(made)
    shutil.rmtree(made / "clip/seed-0/strong-lr0.001")
    torch.manual_seed(1)
    seen = []
    monkeypatch.setattr(clip_points, "load_clip", lambda *place, **more: seen.append(place) or real(*place, **more))
    recipe.run(parse(recipe.Config, ["--config", str(SMOKE), "--output_dir", str(made)]))
    after = stamps(made)
    assert {Path(name).parts[2] for name in before if after[name] != before[name]} == {"strong-lr0.001"}
    assert after.keys() == before.keys() and len(seen) == 3, "the poisoned model and two checkpoints"
    assert "$ accelerate launch -q recipes/clean_clip.py" in capsys.readouterr().out


real = clip_points.load_clip


def test_a_run_that_breaks_off_is_a_result(recipe, made, monkeypatch):
    run = made / "clip/seed-0/finetune-lr0.001"
    shutil.rmtree(run / "model")
    stage = recipe_files.stage

    def breaking(name: str, *given: object) -> None:
        if name == "clean_clip" and str(given[-1]) == str(run):
            content = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps(content | {"status": "failed", "error": "the loss is nan"}))
            raise Diverged("the loss is nan")
        stage(name, *given)

    monkeypatch.setattr(recipe_files, "stage", breaking)
    recipe.run(parse(recipe.Config, ["--config", str(SMOKE), "--output_dir", str(made)]))
    points, trainings = benchmark.read(made)
    assert len(points) == 8 and [one.error for one in trainings if one.status == "failed"] == ["the loss is nan"]
    assert "1 of 4 cleaning runs broke off" in (made / "report.html").read_text()


def test_a_full_disk_is_no_result(recipe, made, monkeypatch):
    before = benchmark.read(made)
    stage = recipe_files.stage

    def full(name: str, *given: object) -> None:
        if name == "clean_clip":
            raise RunFault("the disk is full")
        stage(name, *given)

    monkeypatch.setattr(recipe_files, "stage", full)
    with pytest.raises(RunFault, match="full"):
        recipe.run(parse(recipe.Config, ["--config", str(SMOKE), "--output_dir", str(made)]))
    assert benchmark.read(made) == before


def test_a_poisoning_that_diverges_ends_its_own_cleanings_alone(recipe, made, monkeypatch):
    run = made / "clip_ssl/seed-0/poisoned"
    calls, stage = [], recipe_files.stage

    def breaking(name: str, *given: object) -> None:
        calls.append((name, str(given[-1])))
        if name == "pretrain_clip" and str(given[-1]) == str(run):
            content = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps(content | {"status": "failed", "error": "the loss is nan"}))
            shutil.rmtree(run / "model")
            raise Diverged("the loss is nan")
        stage(name, *given)

    monkeypatch.setattr(recipe_files, "stage", breaking)
    recipe.run(parse(recipe.Config, ["--config", str(SMOKE), "--output_dir", str(made)]))
    assert [name for name, place in calls if "clip_ssl" in place] == ["pretrain_clip"]
    points, trainings = benchmark.read(made)
    assert {one.objective for one in points} == {"clip"} and {one.cleaner for one in points} > {"finetune", "strong"}
    failed = [(one.objective, one.stage) for one in trainings if one.status == "failed"]
    assert failed == [("clip_ssl", "poisoned")]
    assert "The poisoned training of clip_ssl, seed 0, broke off" in (made / "report.html").read_text()


def test_a_refused_call_leaves_what_says_how_all_was_made(recipe, made):
    files = [made / "config.yaml", *sorted((made / "settings").iterdir())]
    before = {file: file.read_text() for file in files}
    flags = ["--config", str(SMOKE), "--output_dir", str(made)]
    with pytest.raises(InputError, match="another config"):
        recipe.run(parse(recipe.Config, [*flags, "--clean.train.adam_weight_decay", "0.7"]))
    assert {file: file.read_text() for file in files} == before
    # What may differ takes its place when the call is through.
    recipe.run(parse(recipe.Config, [*flags, "--clean.train.dataloader_num_workers", "1"]))
    assert "dataloader_num_workers: 1" in (made / "settings/clean_clip.yaml").read_text()
    assert sorted((made / "settings").iterdir()) == files[1:] and not list(made.glob("*.new.yaml"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("objectives: {clop: {}}", "clop"),
        ("cleaners: {finetune: {defense.wrong: 1}}", "wrong"),
        ("objectives: {clip: {train.max_train_steps: many}}", "many"),
        ("cleaners: {}", "cleaners"),
        ("cleaners: {a/b: {defense: finetune}}", "use letters, digits"),
        ("models_from: nowhere", "no run has finished there"),
        ("learning_rates: []", "learning_rates"),
        ("selection_data: somewhere", "give all of pretrain.train_data"),
        ("pretrain: {poison: {label: yellow cat, trigger: patch}}", "poison.count"),
        ("pretrain: {model: clip_tiny_resnet}", "pretrain.poison is missing"),
        ("blind: {name: oracle}", "largest_drift, best_utility"),
        ("cleaners: {a: {defense: cleanclip, seed: 5}}", r"cleaners.a.seed is not possible: the benchmark sets seed itself"),
        ("cleaners: {a: {defense: cleanclip, train.learning_rate: 1.0}}", "cleaners.a.train.learning_rate is not possible"),
        ("cleaners: {a: {defense: cleanclip, lr: 1.0}}", "cleaners.a.lr is not possible"),
        ("cleaners: {a: {defense: cleanclip, output_dir: x}}", "cleaners.a.output_dir is not possible"),
        ("cleaners: {a: {defense: cleanclip, model: x}}", "cleaners.a.model is not possible"),
        ("objectives: {clip: {poison.seed: 1}}", "objectives.clip.poison.seed is not possible"),
        ("clean: {seed: 1}", "seeds are all set by `seeds`"),
        ("pretrain: {seed: 1, poison: {label: yellow cat, trigger: patch, count: 3}}", "seeds are all set by `seeds`"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_made(recipe, tmp_path, changed, said):
    key = changed.split(":")[0]
    kept = [] if key == "pretrain" else ["pretrain: {poison: {label: yellow cat, trigger: patch, count: 3}}"]
    (tmp_path / "grid.yaml").write_text("\n".join([changed, *kept]) + "\n")
    with pytest.raises(InputError, match=said):
        recipe.run(parse(recipe.Config, ["--config", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "x")]))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", sorted((CONFIGS / "benchmark_objectives").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_are_valid(recipe, path, tmp_path):
    cfg = parse(recipe.Config, ["--config", str(path)])
    if cfg.models_from:
        shutil.copyfile(CONFIGS / "benchmark_objectives/shapes.yaml", tmp_path / "config.yaml")
        cfg = recipe.completed(dataclasses.replace(cfg, models_from=str(tmp_path)))
        assert cfg.pretrain.poison is not None and cfg.clean.save_models_every == 40
    recipe.check(cfg)
    # All compare objectives, but for those that ask whether a cell is hard for a cleaner.
    one = path.stem in ("cifar10_hard", "cifar10_structured", "cifar10_faint")
    assert len(cfg.cleaners) > 1 and cfg.control is not False and (len(cfg.objectives) > 1) == (not one)
