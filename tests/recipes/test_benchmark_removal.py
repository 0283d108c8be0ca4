"""The benchmark of removals: every stage once, only what is missing is made, tuning is apart, wrong grids end early."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.evaluate import removal_scores
from mmbackdoor.evaluate.prompts import load_prompts
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.results import removal_benchmark, removal_comparison, removal_tuning
from mmbackdoor.types import Diverged, InputError

CONFIGS = recipe_files.folders()["recipes"] / "configs"
SMOKE = CONFIGS / "smoke/benchmark_removal.yaml"


@pytest.fixture(scope="module")
def recipe():
    return recipe_files.load("benchmark_removal")


def run(recipe, folder: Path, *flags: str, config: Path = SMOKE) -> Path:
    recipe.run(parse(recipe.Config, ["--config", str(config), "--output_dir", str(folder), *flags]))
    return folder


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory) -> Path:
    return run(recipe, tmp_path_factory.mktemp("runs") / "benchmark")


def stamps(folder: Path) -> dict[str, int]:
    kept = ("model", "samples.jsonl", "data", "latents")
    files = [path for path in folder.rglob("*") if path.is_file() and set(path.relative_to(folder).parts) & set(kept)]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_every_model_is_measured(made):
    points, runs = removal_benchmark.read(made)
    ends = [one for one in points if (one.metric, one.condition, one.seed) == ("asr", "triggered", 0)]
    found = {(one.removal, one.step, one.situation) for one in ends}
    assert found == {
        *((removal, 0, "") for removal in ("none", "clean")),
        *((removal, step, "") for removal in ("finetune", "skd") for step in (1, 2)),
        *((*one, "stress:guided") for one in (("none", 0), ("clean", 0), ("finetune", 2), ("skd", 2))),
        *((*one, "relearn:1") for one in (("clean", 0), ("finetune", 2), ("skd", 2))),
    }
    assert {one.n for one in ends} == {4} and len({one.condition for one in points}) > 3, "near triggers, too"
    assert [(one.removal, one.status, one.steps, one.samples) for one in runs] == [
        ("finetune", "finished", 2, 4), ("skd", "finished", 2, 4)
    ]  # fmt: skip
    assert all((made / name).is_file() for name in ("report.html", "table.md", "curves.png", "config.yaml"))
    assert not list(made.rglob("*.part")) and not (made / removal_tuning.FILE_NAME).exists()
    compared = removal_comparison.read(made)
    assert {(one.removal, one.against) for one in compared} == {("skd", "finetune")}
    assert {(one.after, one.situation) for one in compared} == {((), ""), ((1,), ""), ((), "stress:guided"), ((), "relearn:1")}
    assert "| patch, skd - finetune |" in (made / "table.md").read_text()


def test_removals_share_the_pictures_of_their_teacher(made):
    place = made / "patch/seed-0"
    assert len(list((place / "latents").iterdir())) == 1
    assert not (place / "skd/latents").exists()
    config = json.loads((place / "skd/run.json").read_text())["config"]
    assert config["defense"]["name"] == "skd" and config["train"]["max_train_steps"] == 2
    # The relearned model is a poisoned one: what was said of its cleaning does not hold any more.
    assert not (place / "skd/relearn-1/model/removal.json").exists() and (place / "skd/model/removal.json").exists()


def test_a_second_call_makes_nothing_and_another_seed_its_own_cells_alone(recipe, made):
    before, table = stamps(made), (made / "table.md").read_text()
    run(recipe, made)
    assert stamps(made) == before and (made / "table.md").read_text() == table
    with pytest.raises(InputError, match="patch-evaluation.txt' holds other prompts"):
        run(recipe, made, "--n_prompts", "5")
    run(recipe, made, "--seeds", "0", "1")
    after = stamps(made)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[:2] for name in after.keys() - before.keys()} == {("patch", "seed-1")}
    points, _ = removal_benchmark.read(made)
    pooled = [one for one in points if one.seed is None and (one.metric, one.condition) == ("asr", "clean")]
    assert {(one.seeds, one.n) for one in pooled} == {(2, 8)}


class Jobs:
    """Stands for the recipes: leaves the files that the benchmark reads. `asr` by the settings of the removal; `breaks`
    says which job diverges. Without a judge no ASR is known."""

    def __init__(self, asr, breaks=lambda flags: False, judge=True):
        self.asr, self.breaks, self.judge, self.calls = asr, breaks, judge, []

    def __call__(self, recipe: str, *words: str) -> None:
        flags = {word[2:]: [] for word in words if word.startswith("--")}
        for word in words:
            key = word[2:] if word.startswith("--") else key
            flags[key] += [] if word.startswith("--") else [word]
        out = Path(flags["output_dir"][0])
        if (out / "samples.jsonl").is_file() or (out / "model/removal.json").is_file():
            return None
        self.calls.append((recipe, flags))
        if recipe == "evaluate_diffusion":
            if self.breaks(flags):
                raise Diverged("the pictures are not finite")
            return self.evaluate(out, flags)
        train = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
        status = "failed" if self.breaks(flags) else "finished"
        content = {"schema": 1, "config": {"train": train}, "world_size": 1, "seconds": 1.0, "error": None}
        (out / "model").mkdir(parents=True)
        (out / "run.json").write_text(json.dumps(content | {"status": status}))
        if status == "failed":
            raise Diverged("the loss of step 2 is not finite")
        removal = {"schema": 1, "method": {"name": "x"}, "steps": 40, "asr": self.asr(flags)}
        (out / "model/removal.json").write_text(json.dumps(removal))

    def evaluate(self, out: Path, flags: dict[str, list[str]]) -> None:
        lines, alike = [], {}
        for place in (*flags["pretrained_model_name_or_path"], *flags.get("compare", []), *flags.get("control", [])):
            file = Path(place) / "removal.json"
            again = "poisoned" in place or "relearn" in place
            stage = "clean" if place == "tiny" else "poisoned" if again else "cleaned"
            alike[stage] = alike.get(stage, 0) + 1
            model = stage if alike[stage] == 1 else f"{stage}-{alike[stage]}"
            cleaned = stage == "cleaned" and file.exists()
            asr = json.loads(file.read_text())["asr"] if cleaned else float(stage != "clean")
            for k, text in enumerate(load_prompts(flags["prompts"][0]).texts):
                for condition in ("clean", "triggered"):
                    scores = {"adherence": True} | ({"asr": k < 20 * asr} if condition == "triggered" and self.judge else {})
                    line = {"model": model, "stage": stage, "prompt_id": text, "prompt": text, "condition": condition}
                    lines.append(json.dumps(line | {"text": text, "seed_index": 0, "image": "x.png", "scores": scores}))
        out.mkdir(parents=True)
        (out / "samples.jsonl").write_text("\n".join(lines) + "\n")


TUNED = """
pictures: 1
n_prompts: 20
n_selection_prompts: 20
attacks:
  patch: {config: tiny_patch}
  object: {config: tiny_object, prompts_with: cross, tuned: false, removal.max_train_steps: 60}
removals:
  skd: {config: tiny, defense: skd, max_train_steps: 40}
  cag: {config: tiny, max_train_steps: 40}
milestones: [40]
tuning:
  seeds: [7]
  rule: {name: lowest_asr, budget: 0.1}
  trials:
    skd: [{learning_rate: 1.0e-4}, {learning_rate: 1.0e-3}]
    cag: [{learning_rate: 1.0e-4}, {learning_rate: 2.0}]
"""


def test_winners_of_the_selection_prompts_alone_meet_the_evaluation_prompts(recipe, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(TUNED)
    rates = {0.0001: 0.5, 0.001: 0.1}
    jobs = Jobs(lambda flags: rates.get(float(flags.get("learning_rate", ["0"])[0]), 0.0),
                breaks=lambda flags: flags.get("learning_rate") == ["2.0"])  # fmt: skip
    monkeypatch.setattr(recipe_files, "stage", jobs)
    folder = run(recipe, tmp_path / "run", config=tmp_path / "grid.yaml")
    trials = removal_tuning.read(folder)
    assert [(one.removal, one.trial, one.winner, one.error is None) for one in trials] == [
        ("skd", 0, False, True), ("skd", 1, True, True), ("cag", 0, True, True), ("cag", 1, False, False)
    ]  # fmt: skip
    assert [one.asr.get("40") for one in trials] == [0.5, 0.1, 0.5, None] and trials[0].attacks == ("patch",)
    assert trials[3].error == "patch, seed 7: the loss of step 2 is not finite" and trials[3].attacks == ("patch",)
    split = {}
    for name, flags in jobs.calls:
        if name == "evaluate_diffusion":
            split.setdefault("/tuning/" in flags["output_dir"][0], set()).add(Path(flags["prompts"][0]).name)
    assert split == {True: {"patch-selection.txt"}, False: {"patch-evaluation.txt", "object-evaluation.txt"}}
    cleanings = [flags for name, flags in jobs.calls if name == "clean_diffusion"]
    confirmed = [flags for flags in cleanings if "/tuning/" not in flags["output_dir"][0]]
    assert [(flags["learning_rate"], flags["max_train_steps"]) for flags in confirmed] == [
        (["0.001"], ["40"]), (["0.0001"], ["40"]), (["0.001"], ["60"]), (["0.0001"], ["60"])
    ]  # fmt: skip
    # A removal of 40 steps has its end there, one of 60 a milestone.
    assert ["milestones" in flags for flags in confirmed] == [False, False, True, True]
    crosses = load_prompts(folder / "data/object-evaluation.txt").texts
    assert len(crosses) == 20 and all(re.search(r"\bcross\b", text) for text in crosses)
    assert "winner" in (folder / "table.md").read_text()


def test_a_run_that_diverges_is_a_result(recipe, tmp_path, monkeypatch):
    text = TUNED.split("tuning:")[0] + "seeds: [0, 1]\n"
    (tmp_path / "grid.yaml").write_text(text)
    jobs = Jobs(lambda flags: 0.0, breaks=lambda flags: "/patch/seed-0/cag" in flags["output_dir"][0]
                or "/object/seed-1/poisoned" in flags["output_dir"][0])  # fmt: skip
    monkeypatch.setattr(recipe_files, "stage", jobs)
    points, runs = removal_benchmark.read(run(recipe, tmp_path / "run", config=tmp_path / "grid.yaml"))
    failed = [(one.attack, one.removal, one.seed) for one in runs if one.status == "failed"]
    assert failed == [("patch", "cag", 0), ("object", "none", 1)]
    cag = [one for one in points if (one.attack, one.removal, one.metric) == ("patch", "cag", "asr")]
    assert [one.seeds for one in cag if one.seed is None] == [1]
    assert f"2 of {len(runs)} removals broke off" in (tmp_path / "run/table.md").read_text()


def test_cells_are_pooled_from_their_scores_alone(recipe, tmp_path, monkeypatch):
    text = TUNED.split("tuning:")[0] + "seeds: [0, 1]\n"
    (tmp_path / "grid.yaml").write_text(text)
    broken = "/patch/seed-0/cag"
    jobs = Jobs(lambda flags: 0.1, breaks=lambda flags: broken in flags["output_dir"][0])
    monkeypatch.setattr(recipe_files, "stage", jobs)
    whole = run(recipe, tmp_path / "whole", config=tmp_path / "grid.yaml")
    place, jobs.calls = tmp_path / "elsewhere", []
    for file in whole.rglob(removal_scores.FILE_NAME):
        (place / file.relative_to(whole)).parent.mkdir(parents=True)
        shutil.copy(file, place / file.relative_to(whole))
    run(recipe, place, config=tmp_path / "grid.yaml")
    assert not jobs.calls
    for name in ("points.jsonl", "runs.jsonl", "table.md"):
        assert (place / name).read_text() == (whole / name).read_text(), name
    assert any(one.status == "failed" for one in removal_benchmark.read(place)[1])
    # Fewer removals are there, too; one that is new, or set otherwise, is run.
    fewer = text.replace("  cag: {config: tiny, max_train_steps: 40}\n", "")
    (tmp_path / "fewer.yaml").write_text(fewer)
    run(recipe, place, config=tmp_path / "fewer.yaml")
    assert not jobs.calls and {one.removal for one in removal_benchmark.read(place)[0]} == {"none", "clean", "skd"}
    for number, other in enumerate(("defense: skd, max_train_steps: 39", "defense: skd, max_train_steps: 40, seed: 1")):
        (tmp_path / "other.yaml").write_text(fewer.replace("defense: skd, max_train_steps: 40", other))
        jobs.calls = []
        run(recipe, shutil.copytree(place, tmp_path / f"other-{number}"), config=tmp_path / "other.yaml")
        assert {name for name, _ in jobs.calls} == {"poison_diffusion", "evaluate_diffusion", "clean_diffusion"}


def test_scores_of_other_settings_or_damaged_are_not_taken(recipe, tmp_path, monkeypatch):
    text = TUNED.split("tuning:")[0]
    (tmp_path / "grid.yaml").write_text(text)
    jobs = Jobs(lambda flags: 0.1)
    monkeypatch.setattr(recipe_files, "stage", jobs)
    whole = run(recipe, tmp_path / "whole", config=tmp_path / "grid.yaml")
    scores = sorted(whole.rglob(removal_scores.FILE_NAME))
    changes = (("milestones: [40]", "milestones: [20]"), ("tiny_patch}", "tiny_patch, attack.timestep_bias: 2.0}"))
    for number, change in enumerate(changes):
        (tmp_path / "other.yaml").write_text(text.replace(*change))
        place, jobs.calls = tmp_path / f"other-{number}", []
        for file in scores:
            (place / file.relative_to(whole)).parent.mkdir(parents=True)
            shutil.copy(file, place / file.relative_to(whole))
        run(recipe, place, config=tmp_path / "other.yaml")
        made = {Path(flags["output_dir"][0]).relative_to(place).parts[0] for _, flags in jobs.calls}
        assert made == ({"patch"} if number else {"patch", "object"})
    # A setting that has come since had its default; another default is another setting.
    content = json.loads(gzip.decompress(scores[0].read_bytes()))
    assert sha256_at("tiny") in content["asked"]["grid"], "not the path of the model"
    shutil.rmtree(scores[0].parent / "skd")
    for part in ("skd", "poison_diffusion"):
        del content["asked"][part]["config"]["train"]["adam_epsilon"]
    scores[0].write_bytes(gzip.compress(json.dumps(content).encode()))
    jobs.calls = []
    run(recipe, whole, config=tmp_path / "grid.yaml")
    assert not jobs.calls
    content["asked"]["skd"]["config"]["sampling"]["num_inference_steps"] += 1
    scores[0].write_bytes(gzip.compress(json.dumps(content).encode()))
    run(recipe, whole, config=tmp_path / "grid.yaml")
    assert {name for name, _ in jobs.calls} == {"clean_diffusion", "evaluate_diffusion"}
    scores[0].write_bytes(scores[0].read_bytes()[:-9])
    with pytest.raises(InputError, match=r"scores.json.gz' is damaged \(.*remove it"):
        run(recipe, whole, config=tmp_path / "grid.yaml")


FOLLOWED = TUNED.split("tuning:")[0] + """
seeds: [0, 1]
stress: {fast: {num_inference_steps: 3}}
durability: {relearn_pairs: [1], relearn_steps: 1}
"""


def test_pictures_that_diverge_are_a_line_and_the_rest_goes_on(recipe, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(FOLLOWED)
    broken = ("patch/seed-0/stress-fast", "patch/seed-1/skd/stress-fast", "patch/seed-1/cag/relearn-1",
              "object/seed-0/evaluation")  # fmt: skip
    jobs = Jobs(lambda flags: 0.0, breaks=lambda flags: flags["output_dir"][0].endswith(broken))
    monkeypatch.setattr(recipe_files, "stage", jobs)
    folder = run(recipe, tmp_path / "run", config=tmp_path / "grid.yaml")
    points, runs = removal_benchmark.read(folder)
    failed = [(one.attack, one.removal, one.seed, one.situation) for one in runs if one.status == "failed"]
    assert failed == [
        ("patch", "none", 0, "stress:fast"), ("object", "none", 0, ""), ("patch", "skd", 1, "stress:fast"),
        ("patch", "cag", 1, "relearn:1"),
    ]  # fmt: skip
    assert not [flags for name, flags in jobs.calls if "/object/seed-0/skd" in flags["output_dir"][0]]
    seeds = {
        (one.attack, one.removal, one.situation): one.seeds
        for one in points if one.seed is None and (one.metric, one.condition) == ("asr", "triggered")
    }  # fmt: skip
    assert seeds["patch", "skd", ""] == 2 and seeds["object", "skd", ""] == 1
    assert seeds["patch", "skd", "stress:fast"] == seeds["patch", "none", "stress:fast"] == 1
    assert seeds["patch", "cag", "relearn:1"] == 1 and seeds["patch", "skd", "relearn:1"] == 2
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    assert "3 further measurements broke off and are in no mean: patch, none, seed 0, fast;" in table
    assert "(1 of 2 seeds) |" in table and "1 of 7 removals broke off" in table
    assert "skd on object, in 1 of 2 seeds (with seed 0 something broke off): " in page
    assert "patch, cag, after 1 poison pair</th>" in page


def test_tuning_goes_on_without_a_cell_that_diverges(recipe, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(TUNED.replace("seeds: [7]", "seeds: [7, 8, 9]"))
    broken = ("tuning/patch/seed-8/poisoned", "tuning/patch/seed-9/evaluation")
    jobs = Jobs(lambda flags: 0.0, breaks=lambda flags: flags["output_dir"][0].endswith(broken))
    monkeypatch.setattr(recipe_files, "stage", jobs)
    folder = run(recipe, tmp_path / "run", config=tmp_path / "grid.yaml")
    assert {one.seeds for one in removal_tuning.read(folder)} == {(7,)}
    lost = [(one.seed, one.situation) for one in removal_benchmark.read(folder)[1] if one.status == "failed"]
    assert lost == [(8, "tuning"), (9, "tuning")]
    assert "patch, none, seed 8, tuning; patch, none, seed 9, tuning" in (folder / "table.md").read_text()
    every = Jobs(lambda flags: 0.0, breaks=lambda flags: flags["output_dir"][0].endswith("/poisoned"))
    monkeypatch.setattr(recipe_files, "stage", every)
    with pytest.raises(Diverged, match="no model could be poisoned to tune on"):
        run(recipe, tmp_path / "none", config=tmp_path / "grid.yaml")


def test_an_attack_without_asr_is_refused_before_anything_is_cleaned(recipe, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(TUNED)
    jobs = Jobs(lambda flags: 0.0, judge=False)
    monkeypatch.setattr(recipe_files, "stage", jobs)
    with pytest.raises(InputError, match="ASR of patch, seed 7 cannot be measured.*give evaluate.judge"):
        run(recipe, tmp_path / "run", config=tmp_path / "grid.yaml")
    assert [name for name, _ in jobs.calls] == ["poison_diffusion", "evaluate_diffusion"]


def test_calls_for_other_seeds_may_run_side_by_side_in_one_folder(recipe, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(TUNED)
    given, folder = {"config": tmp_path / "grid.yaml"}, tmp_path / "run"
    jobs, inside = Jobs(lambda flags: 0.0), []

    def stage(name: str, *words: str) -> None:
        if "/patch/seed-0/" in words[-1] and "/tuning/" not in words[-1] and not inside:
            inside.append(run(recipe, folder, "--seeds", "1", **given))
        jobs(name, *words)

    monkeypatch.setattr(recipe_files, "stage", stage)
    run(recipe, folder, "--seeds", "0", **given)
    assert inside and {one.seed for one in removal_benchmark.read(folder)[0]} == {0, None}
    made, tuning = len(jobs.calls), (folder / "tuning.jsonl").read_text()
    run(recipe, folder, "--seeds", "0", "1", **given)
    assert len(jobs.calls) == made and {one.seed for one in removal_benchmark.read(folder)[0]} == {0, 1, None}
    assert (folder / "tuning.jsonl").read_text() == tuning and not list(folder.glob("*.new.yaml"))
    assert parse(recipe.Config, ["--config", str(folder / "config.yaml")]).seeds == (0, 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("attacks: {patch: {config: tiny_patch, attack.wrong: 1}}", "unknown key 'wrong'"),
        ("attacks: {patch: {config: tiny_pach}}", "tiny_pach"),
        ("attacks: {patch: {config: tiny_patch, removal.learning_rat: 1.0}}", "unknown key 'learning_rat'"),
        ("attacks: {patch: {config: tiny_patch, evaluate.scheduler_: x}}", "unknown key 'scheduler_'"),
        ("attacks: {patch: {config: tiny_patch, prompts_with: dragon}}", "0 different evaluation captions"),
        ("attacks: {clean: {config: tiny_patch}}", "uses itself"),
        ("removals: {skd: {defense: sdk}}", "did you mean 'skd'"),
        ("removals: {skd: {config: tiny, max_train_steps: none}}", "has no max_train_steps"),
        ("removals: {}", r"^removals: \{\} \(in .* is not possible"),
        ("removals: {skd: {config: tiny, prompts: shapes-evaluation}}", "used for cleaning and for evaluation"),
        ("tuning: {trials: {skd: [{}, {}], finetune: [{}]}}", "skd 2, finetune 1"),
        ("tuning: {seeds: [0], trials: {skd: [{}], finetune: [{}]}}", "seed 0 is one of tuning.seeds"),
        ("tuning: {trials: {skd: [{defense.x: 1}], finetune: [{}]}}", "unknown key 'x'"),
        ("tuning: {rule: oracle, trials: {skd: [{}], finetune: [{}]}}", "lowest_asr"),
        ("stress: {fast: {num_inference_step: 3}}", "unknown key 'num_inference_step'"),
        ("durability: {benign_steps: 0}", "^durability.benign_steps: 0 .* is not possible"),
        ("durability: {relearn_pairs: [1], relearn: {rate: 1}}", "unknown key 'rate'"),
        ("attacks: {word: {config: tiny_rickrolling}}\ndurability: {relearn_pairs: [1]}", "counts pictures"),
        ("against: {skd: finetune, cag: skd}", "against names 'cag', which is none of the removals skd, finetune"),
        ("against: {skd: none}", "against names 'none'"),
        ("scenes: null", "without scenes to draw"),
        ("milestones: [0]", r"^milestones: \[0\] .* is not possible"),
        ("seeds: []", r"^seeds: \[\] .* is not possible"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_made(recipe, tmp_path, changed, said):
    lines = {
        "attacks": "attacks: {patch: {config: tiny_patch}}",
        "removals": "removals: {skd: {config: tiny, defense: skd}, finetune: {config: tiny, defense: finetune}}",
    }
    kept = [line for key, line in lines.items() if not changed.startswith(f"{key}:")]
    (tmp_path / "grid.yaml").write_text("\n".join([*kept, changed]) + "\n")
    with pytest.raises(InputError, match=said):
        run(recipe, tmp_path / "x", config=tmp_path / "grid.yaml")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", sorted((CONFIGS / "benchmark_removal").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_are_valid(recipe, path):
    cfg = parse(recipe.Config, ["--config", str(path)])
    attacks, suites = recipe.check(cfg)
    assert len(cfg.removals) >= 2 and len(cfg.seeds) >= (5 if cfg.tuning else 3)
    studies = {"tiny": ({"patch", "style", "object"}, {"finetune", "skd", "skd_cag"})}
    if path.stem in studies:
        assert (set(attacks), set(cfg.removals)) == studies[path.stem]
    if cfg.tuning:
        # Confirmed on an attack that was not tuned on.
        assert {True, False} == {attack.tuned for attack in attacks.values()}
    assert all(len(suites[name, "evaluation"]) == cfg.material.n_prompts for name in attacks)
