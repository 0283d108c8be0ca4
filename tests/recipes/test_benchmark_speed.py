"""The benchmark of speed: every measurement gives lines, none is made again, wrong calls end early."""

from __future__ import annotations

import json

import pytest

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.shards.read import expand
from mmbackdoor.speed import loader, rows
from mmbackdoor.types import InputError

SMOKE = recipe_files.folders()["recipes"] / "configs/smoke/benchmark_speed.yaml"


@pytest.fixture(scope="module")
def recipe():
    return recipe_files.load("benchmark_speed")


def run(recipe, folder, *flags: str) -> None:
    recipe.run(parse(recipe.Config, ["--config", str(SMOKE), "--output_dir", str(folder), *flags]))


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "speed"
    run(recipe, folder)
    return folder


def test_every_figure_has_its_ratio(made):
    found = rows.read(made / "results.jsonl")
    assert {row.measurement for row in found} == {"skd", "seals", "clip", "generation", "growth", "loader"}
    assert all(row.ratio is not None and row.ours > 0 and row.peer > 0 for row in found)
    assert {row.where.architecture for row in found} == {"tiny"} and {row.where.processes for row in found} == {1}
    names = {row.name for row in found}
    assert {"skd step", "attention guidance", "generate", "score", "clip_ssl step, tiny_judge"} <= names
    grown = {row.name for row in found if row.ratio_of == "exponent"}
    assert grown == {f"cost against {name}" for name in ("prompts", "batch", "pixels", "shards")}
    table = (made / "table.md").read_text().splitlines()
    assert len(table) == len(found) + 2 and (made / "growth.png").stat().st_size > 1000
    assert not list(made.rglob("*.part")) and not list(made.rglob("*.png.*"))


def test_what_is_measured_is_not_measured_again(recipe, made, monkeypatch, capsys):
    before = (made / "results.jsonl").read_bytes()
    for module in (recipe.skd_steps, recipe.clip_steps, recipe.generation, recipe.growth, recipe.loader):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(recipe.seals, "measure", lambda bench, folder: rows.read(made / "measured/skd.jsonl")[:1])
    (made / "measured/seals.jsonl").unlink()
    run(recipe, made)
    now = (made / "results.jsonl").read_text().splitlines()
    assert len(now) == len(before.splitlines()) - 1 and "skd step" in capsys.readouterr().out
    (made / "results.jsonl").write_bytes(before)


def test_other_settings_are_refused_and_more_measurements_are_not(recipe, made):
    with pytest.raises(InputError, match=r"measured with other settings \(bench.batch_size was 2 and is 3\)"):
        run(recipe, made, "--batch_size", "3")
    cfg = parse(recipe.Config, ["--config", str(SMOKE), "--measure", "published", "--profile"])
    assert recipe.check(cfg, made, False) == ["published"]


def test_what_cannot_be_measured_is_said_before_anything_is(recipe, tmp_path):
    cfg = parse(recipe.Config, ["--architecture", "sd15", "--measure", "skd", "removal"])
    with pytest.raises(InputError, match="--measure removal needs a model that draws what it is asked for"):
        recipe.check(cfg, tmp_path, False)
    assert set(recipe.ALL) - set(recipe.check(parse(recipe.Config, ["--architecture", "sd15"]), tmp_path, False)) == {
        "removal", "quickstart"
    }  # fmt: skip
    with pytest.raises(InputError, match="--measure growth is for one process; with several, measure skd or clip"):
        recipe.check(parse(recipe.Config, ["--measure", "growth"]), tmp_path, True)
    assert list(recipe.check(parse(recipe.Config, []), tmp_path, True)) == ["skd", "clip"]


def test_every_reader_reads_every_picture(made):
    reading = loader.Reading(samples=64, num_workers=(1,), loader_batch_size=16, size=32)
    paths = expand(str(made / "shards"))
    for reader in loader.READERS.values():
        assert sum(reader(reading, 0, paths, 1)) == 64


@pytest.mark.slow
def test_two_processes_measure_skd_and_clip(recipe, tmp_path):
    folder = tmp_path / "run"
    run(recipe, folder, "--measure", "processes")
    found = [json.loads(line) for line in (folder / "results.jsonl").open()]
    assert [row["name"] for row in found] == [
        "attention guidance", "clip step, tiny_judge", "clip_ssl step, tiny_judge", "cost against processes"
    ]  # fmt: skip
    assert {row["where"]["processes"] for row in found} == {2}
