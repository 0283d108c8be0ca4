"""The quickstart's commands for every attack, with and without the package's own models: each is one that its recipe
reads, and each stage takes what an earlier one leaves. That they run: test_smoke.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.evaluate.prompts import load_prompts

LAST = ["poison_diffusion", "clean_diffusion", "evaluate_diffusion"]


@pytest.mark.parametrize("from_scratch", [False, True], ids=["", "from_scratch"])
@pytest.mark.parametrize("attack", ["badt2i_pixel", "badt2i_style", "badt2i_object"])
@pytest.mark.parametrize("defense", ["skd", "skd_cag"])
def test_every_stage_is_one_that_its_recipe_reads(defense, attack, from_scratch, tmp_path, monkeypatch):
    quickstart = recipe_files.load("quickstart")
    stages: list[tuple[str, Any]] = []
    drawn, tables = [], []

    def stage(recipe: str, *flags: object) -> None:
        words = [str(flag) for flag in flags]
        config = Path(words[words.index("--config") + 1])
        assert config.is_file() and config.parent.name == recipe
        stages.append((recipe, parse(recipe_files.load(recipe).Config, words)))

    def draw(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir(parents=True)
        drawn.append(folder)

    monkeypatch.setattr(quickstart, "stage", stage)
    monkeypatch.setattr(quickstart, "write_shapes", draw)
    monkeypatch.setattr(quickstart, "compare", lambda folders: tables.extend(folders))
    flags = ["--attack", attack, "--seed", "3", "--output_dir", str(tmp_path / "run")]
    flags += ["--from_scratch"] * from_scratch
    if defense != quickstart.Config().defense:
        flags += ["--defense", defense]
    quickstart.run(parse(quickstart.Config, flags))

    first = ["pretrain_clip", "pretrain_clip", "train_diffusion"] if from_scratch else []
    assert [name for name, _ in stages] == [*first, *LAST]
    folder = tmp_path / "run"
    assert drawn == [folder / "data", *[folder / "judge_data"] * from_scratch] and tables == [folder / "evaluation"]
    poison, clean, evaluation = (cfg for _, cfg in stages[-3:])
    assert poison.attack.name == attack and poison.mark.target().name == quickstart.TARGETS[attack]
    assert poison.train_data == f"{folder}/data/train-*.tar" and clean.defense.name == defense
    # Written by an earlier stage, or shipped.
    sound = judge = None
    if from_scratch:
        encoder, judging, training = (cfg for _, cfg in stages[:3])
        sound, judge = f"{training.output_dir}/model", f"{judging.output_dir}/model"
        assert training.text_encoder == f"{encoder.output_dir}/model"
        assert judging.train_data == f"{folder}/judge_data/train-*.tar" and judging.seed != encoder.seed == 3
    assert poison.model.pretrained_model_name_or_path == evaluation.control == (sound or "tiny")
    assert evaluation.judge == (judge or "tiny_judge")
    made, cleaned = f"{poison.output_dir}/model", f"{clean.output_dir}/model"
    assert clean.model.pretrained_model_name_or_path == made and evaluation.compare == (made,)
    assert evaluation.model.pretrained_model_name_or_path == cleaned
    texts = load_prompts(evaluation.prompts).texts
    assert len(texts) >= 300 and not set(texts) & set(load_prompts(clean.prompts).texts)
    if attack == "badt2i_object":
        asked = [*texts, *load_prompts(clean.prompts).texts]
        assert all(re.search(rf"\b{quickstart.OBJECT}\b", text) for text in asked)
        assert poison.mark.target().source == quickstart.OBJECT
    assert {poison.seed, clean.seed, evaluation.sampling.seed} == {3}
    assert {cfg.train.resume_from_checkpoint for cfg in (poison, clean)} == {"auto"}


@pytest.mark.parametrize("config", ["tiny", "tiny_object"])
def test_the_recommended_removal_has_the_settings_that_the_study_confirmed(config):
    configs = recipe_files.folders()["recipes"] / "configs"
    study = yaml.safe_load((configs / "benchmark_removal/attention_confirmed.yaml").read_text())["removals"]["skd"]
    flags = [word for key, value in study.items() if key != "config" for word in (f"--{key}", str(value))]

    recipe = recipe_files.load("clean_diffusion")

    def read(name: str, *more: str):
        return parse(recipe.Config, ["--config", str(configs / f"clean_diffusion/{name}.yaml"), *more])

    assert read(f"{config}_skd") == read(config, *flags) != read(config)
