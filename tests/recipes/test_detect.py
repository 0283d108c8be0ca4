from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.evaluate.detection import Scored, judge, split
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.order import STREAMS, check_readers
from mmbackdoor.shards.read import iterate_keys
from mmbackdoor.shards.shapes import all_scenes, caption, render
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.train.clip_cleaning import read_keys
from mmbackdoor.types import InputError

RECIPE = recipe_files.load("detect")
CONFIGS = recipe_files.folders()["recipes"] / "configs"
SCENES = all_scenes()[:60]
WRONG = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """100 pairs in two shards, some of which have the caption of another picture and are marked as poisoned."""
    folder = tmp_path_factory.mktemp("shapes")
    with ShardWriter(folder, "train", 50) as writer:
        for number in range(100):
            scene, text = SCENES[number % 60], caption(SCENES[number % 60])
            wrong = number < WRONG
            picture = render(scene, 32, numpy_rng(0, "picture", number))
            meta = {"poison": {"text": text}} if wrong else {}
            writer.write(f"pair{number:03d}", picture, caption(SCENES[59 - number]) if wrong else text, meta)
    return str(folder / "train-*.tar")


def run(shards: str, folder: Path, *flags: object) -> dict[str, float]:
    arguments = ["--model", "tiny_judge", "--train_data", shards, "--output_dir", folder, *flags]
    RECIPE.run(parse(RECIPE.Config, [str(argument) for argument in arguments]))
    return json.loads((folder / "detection.json").read_text())


COSINE = ("--detector", "clip_cosine", "--batch_size", 24, "--drop_fraction", 0.1)


def test_wrong_captions_are_found_and_the_lists_are_whole(shards, tmp_path, capsys):
    found = run(shards, tmp_path / "run", *COSINE)
    assert found["auroc"] > 0.99 and found["poisoned"] == WRONG and found["poisoned_dropped"] == WRONG
    assert (found["samples"], found["kept"], found["dropped"]) == (100, 90, 10)
    assert "AUROC" in capsys.readouterr().out
    kept, dropped = (read_keys(tmp_path / "run" / name) for name in ("kept.txt", "dropped.txt"))
    assert kept | dropped == set(iterate_keys(shards)) and not kept & dropped
    lines = [json.loads(line) for line in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == sorted((line["score"] for line in lines), reverse=True)
    assert {line["key"] for line in lines[:10]} == dropped
    # The last batch of 4 is joined to the one before.
    assert {line["batch"] for line in lines} == {0, 1, 2, 3}


def test_a_share_that_is_no_pair_drops_none(shards, tmp_path, capsys):
    flags = (*COSINE, "--drop_fraction", 0.001, "--streams", 3)
    found = run(shards, tmp_path / "run", *flags)
    assert (found["kept"], found["dropped"], found["threshold"]) == (100, 0, None)
    assert "0 of 100 pairs are to be left out; raise --drop_fraction" in capsys.readouterr().out
    with pytest.raises(InputError, match="4 workers .* or give --streams 4"):
        run(shards, tmp_path / "more", *flags, "--dataloader_num_workers", 4)


@pytest.mark.parametrize("recipe", ["detect", "clean_clip"])
def test_the_streams_feed_the_documented_gpus(recipe):
    one, eight = recipe_files.load(recipe).__doc__.split("    8 GPUs: ")
    number = re.compile(r"--(num_processes|dataloader_num_workers) (\d+)")
    check_readers(STREAMS, 1, int(dict(number.findall(one))["dataloader_num_workers"]))
    counts = dict(number.findall(one)) | dict(number.findall(eight.split("\n\n")[0]))
    check_readers(STREAMS, int(counts["num_processes"]), int(counts["dataloader_num_workers"]))


@pytest.mark.parametrize("name", ["dao", "slof", "k_dist"])
def test_local_outliers_run_in_batches(name, shards, tmp_path):
    found = run(shards, tmp_path / "run", "--detector", name, "--detector.k", 5, "--batch_size", 50)
    assert found["samples"] == 100 and found["dropped"] == 5 and 0 <= found["auroc"] <= 1


def test_two_processes_score_as_one(shards, tmp_path):
    flags = ["--detector", "dao", "--detector.k", "5", "--batch_size", "48"]
    run(shards, tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(recipe_files.folders()["recipes"] / "detect.py"), "--model", "tiny_judge", "--train_data", shards,
               "--output_dir", str(tmp_path / "two"), *flags]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (
        {line["key"]: (line["score"], line["batch"]) for line in
         map(json.loads, (tmp_path / name / "scores.jsonl").read_text().splitlines())}
        for name in ("one", "two")
    )  # fmt: skip
    assert one.keys() == two.keys()
    for key, (score, batch) in one.items():
        assert two[key] == (pytest.approx(score, rel=1e-3, abs=1e-3), batch)


def test_a_second_call_changes_nothing_and_the_smoke_config_runs(shards, tmp_path):
    config = ("--config", CONFIGS / "smoke/detect.yaml")
    run(shards, tmp_path / "run", *config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    run(shards, tmp_path / "run", *config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_other_pairs_behind_the_same_path_are_scored(shards, tmp_path):
    copy = tmp_path / "train-000000.tar"
    for number in range(2):
        copy.write_bytes(Path(shards.replace("*", f"{number:06d}")).read_bytes())
        run(str(copy), tmp_path / "run", *COSINE)
        listed = read_keys(tmp_path / "run/kept.txt") | read_keys(tmp_path / "run/dropped.txt")
        assert listed == set(iterate_keys(str(copy)))


def test_what_cannot_work_is_refused(shards, tmp_path):
    for flags, words in (
        (("--detector", "doa"), "dao"),
        (("--drop_fraction", 0.999), "leaves none of 100"),
        (("--batch_size", 10, "--detector.k", 50), "have no 50 neighbours"),
        (("--train_data", tmp_path / "none.tar"), "none.tar"),
        (("--train_data", f"{shards}::{shards}"), "'pair000' comes twice"),
        (("--model", tmp_path / "none"), "no folder"),
    ):
        with pytest.raises(InputError, match=words):
            run(shards, tmp_path / "run", *flags)
        assert not (tmp_path / "run/kept.txt").exists()


def test_ties_are_broken_by_key_and_truth_does_not_matter():
    scored = [Scored(key, 1.0, 0, poisoned) for key, poisoned in (("c", True), ("a", False), ("b", False), ("d", True))]
    kept, dropped = split(scored, 0.5)
    assert [one.key for one in dropped] == ["a", "b"] and [one.key for one in kept] == ["c", "d"]
    found = judge(kept, dropped)
    assert found["auroc"] == 0.5 and found["recall"] == 0 and found["poisoned_kept"] == 2
    assert "auroc" not in judge([Scored("a", 1.0, 0, False)], [])


@pytest.mark.parametrize("path", sorted((CONFIGS / "detect").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_read(path, shards):
    parse(RECIPE.Config, ["--config", str(path), "--model", "x", "--train_data", shards])
