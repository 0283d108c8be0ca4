"""Models on the way of a removal: whole, the last one the model itself, and the same after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.models.provenance import check_provenance, read_removal
from mmbackdoor.train.milestones import milestone
from mmbackdoor.types import InputError, RunFault

SMOKE = recipe_files.folders()["recipes"] / "configs/smoke/clean_diffusion.yaml"
FLAGS = ("--defense.latents", "noise", "--use_ema", "--ema_decay", "0.5", "--resume_from_checkpoint", "auto")


@pytest.fixture(scope="module")
def recipe():
    return recipe_files.load("clean_diffusion")


def clean(recipe, folder: Path, *flags: object) -> Path:
    arguments = ["--config", SMOKE, *FLAGS, "--output_dir", folder, *flags]
    recipe.run(parse(recipe.Config, [str(argument) for argument in arguments]))
    return folder


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return clean(recipe, tmp_path_factory.mktemp("runs") / "whole", "--milestones", 1, 2, 3)


def content(model: Path) -> dict[str, bytes]:
    weights = {str(path.relative_to(model)): path.read_bytes() for path in sorted(model.rglob("*.safetensors"))}
    assert "unet/diffusion_pytorch_model.safetensors" in weights
    return weights


def test_the_milestone_at_the_last_step_is_the_model(whole):
    last = milestone(whole, 3)
    assert content(last) == content(whole / "model")
    assert (last / "removal.json").read_bytes() == (whole / "model/removal.json").read_bytes()
    files = {path.relative_to(last) for path in last.rglob("*")}
    assert files == {path.relative_to(whole / "model") for path in (whole / "model").rglob("*")}


def test_those_before_are_others_and_say_so(whole):
    models = [content(milestone(whole, step)) for step in (1, 2, 3)]
    assert models[0] != models[1] != models[2]
    assert [read_removal(milestone(whole, step))["steps"] for step in (1, 2, 3)] == [1, 2, 3]
    check_provenance(milestone(whole, 1))
    assert not list(whole.rglob("*.part"))


def test_milestones_change_nothing(recipe, whole, tmp_path):
    assert content(clean(recipe, tmp_path / "plain") / "model") == content(whole / "model")


def test_a_stopped_run_goes_on_to_the_same_milestones(recipe, whole, tmp_path, monkeypatch):
    save, folder = recipe.save_milestone, tmp_path / "stopped"

    def stopping(session, model, step, describe):
        if step == 3:
            raise RunFault("stopped")
        save(session, model, step, describe)

    monkeypatch.setattr(recipe, "save_milestone", stopping)
    with pytest.raises(RunFault, match="stopped"):
        clean(recipe, folder, "--milestones", 1, 2, 3)
    monkeypatch.undo()
    # What a kill while writing leaves, and a model of a longer run of this folder.
    (folder / "milestones/3/.model.x.part").mkdir(parents=True)
    (folder / "milestones/3/model").mkdir()
    (folder / "milestones/3/model/old.safetensors").write_text("")
    clean(recipe, folder, "--milestones", 1, 2, 3)
    assert json.loads((folder / "run.json").read_text())["resumed"][0]["step"] == 2
    for step in (1, 2, 3):
        assert content(milestone(folder, step)) == content(milestone(whole, step))
    assert not list(folder.rglob("*.part"))


def test_a_milestone_after_the_end_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="--milestones 4 comes after the last of 3 steps"):
        clean(recipe, tmp_path / "run", "--milestones", 2, 4)
    assert not (tmp_path / "run").exists()
