from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.build_shapes import Config, main
from mmbackdoor.config import parse
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.pairs import PairScene, split_key
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.types import InputError

SMALL = ["--train_samples", "60", "--selection_samples", "30", "--evaluation_samples", "50", "--resolution", "16"]


def test_three_splits_with_sizes_card_and_captions_disjoint_by_combination(tmp_path):
    main(parse(Config, [*SMALL, "--samples_per_shard", "40", "--output_dir", str(tmp_path)]))
    assert json.loads((tmp_path / "sizes.json").read_text()) == {
        "train-000000.tar": 40,
        "train-000001.tar": 20,
        "selection-000000.tar": 30,
        "evaluation-000000.tar": 40,
        "evaluation-000001.tar": 10,
    }
    scenes, captions = {}, {}
    for split in ("train", "selection", "evaluation"):
        report = BadSamples()
        samples = [s for path in expand(f"{tmp_path}/{split}-*.tar") for s in iterate_shard(path, report)]
        assert not report.total and all(s.image.size == (16, 16) and s.meta["split"] == split for s in samples)
        scenes[split] = {s.meta["scene"] for s in samples}
        captions[split] = set((tmp_path / f"captions-{split}.txt").read_text().splitlines())
        assert {s.text for s in samples} <= captions[split]
    for first, second in (("train", "selection"), ("train", "evaluation"), ("selection", "evaluation")):
        assert not scenes[first] & scenes[second] and not captions[first] & captions[second]
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense:") and "| train | 60 | 224 |" in card
    loader = ShardLoader(f"{tmp_path}/train-*.tar", seed=0, batch_size=10, epochs=1)
    assert sum(len(batch) for batch in loader) == 60


def test_options_reach_the_pictures(tmp_path):
    flags = ["--shapes", "star", "heart", "--colours", "red", "blue", "pink", "--sizes", "unstated"]
    flags += ["--positions", "left", "right", "--splits", "train", "--image_format", "webp", "--train_samples", "40"]
    main(parse(Config, [*SMALL, *flags, "--output_dir", str(tmp_path)]))
    samples = list(iterate_shard(str(tmp_path / "train-000000.tar"), BadSamples()))
    assert len(samples) == 40 and not list(tmp_path.glob("evaluation*"))
    assert {s.meta["shape"] for s in samples} == {"star", "heart"} and {s.meta["size"] for s in samples} == {None}
    assert {s.meta["colour"] for s in samples} <= {"red", "blue", "pink"}
    assert all(s.text.endswith(("on the left", "on the right")) for s in samples)


@pytest.mark.parametrize(
    "flags",
    [
        ["--selection_fraction", "0.5", "--evaluation_fraction", "0.5"],
        ["--sizes", "small", "unstated"],
        ["--shapes", "cross", "cross"],
        ["--shapes", "hexagon"],
        ["--resolution", "2"],
        ["--selection_fraction", "0"],
        ["--colours", "red"],
    ],
    ids=" ".join,
)
def test_impossible_settings_are_input_errors(tmp_path, flags):
    with pytest.raises(InputError):
        main(parse(Config, [*SMALL, *flags, "--splits", "selection", "--output_dir", str(tmp_path / "out")]))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_script_runs_and_a_mistake_is_one_sentence(tmp_path):
    script = str(Path(__file__).parents[2] / "data" / "build_shapes.py")
    command = [sys.executable, script, *SMALL, "--output_dir", str(tmp_path / "with space é")]
    options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(Path(script).parents[1])}}
    assert "train: 60 pictures" in subprocess.run(command, check=True, **options).stdout
    wrong = subprocess.run([*command, "--train_samples", "61"], **options)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--overwrite" in wrong.stderr


def test_classes_to_recognise_come_from_the_evaluation_split_alone(tmp_path, capsys):
    flags = ["--class_samples", "1", "--extra_classes", "yellow cat", "--output_dir", str(tmp_path)]
    main(parse(Config, [*SMALL, *flags]))
    names = (tmp_path / "classes/classnames.txt").read_text().splitlines()
    assert len(names) == 33 and names[-1] == "yellow cat" and "1 pictures of each class" in capsys.readouterr().out
    shown = {s.meta["scene"] for s in iterate_shard(str(tmp_path / "classes/test/0.tar"), BadSamples())}
    trained = {s.meta["scene"] for s in iterate_shard(str(tmp_path / "train-000000.tar"), BadSamples())}
    assert len(shown) == 32 and not shown & trained


def test_pairs_have_three_splits_that_share_no_two_things(tmp_path, capsys):
    main(parse(Config, ["--scenes", "pairs", *SMALL, "--workers", "2", "--output_dir", str(tmp_path)]))
    assert "train: 60 pictures in 1 shards" in capsys.readouterr().out
    keys = {}
    for split in ("train", "selection", "evaluation"):
        report = BadSamples()
        samples = list(iterate_shard(str(tmp_path / f"{split}-000000.tar"), report))
        assert not report.total and all(s.image.size == (16, 16) and s.meta["split"] == split for s in samples)
        assert {s.text for s in samples} == set((tmp_path / f"captions-{split}.txt").read_text().splitlines())
        keys[split] = {split_key(PairScene.from_dict(s.meta)) for s in samples}
    assert not keys["train"] & (keys["selection"] | keys["evaluation"]) and not keys["selection"] & keys["evaluation"]
    assert json.loads((tmp_path / "sizes.json").read_text())["train-000000.tar"] == 60
    assert json.loads((tmp_path / "pairs.json").read_text())["train"]["resolution"] == 16
    assert "| evaluation | 50 |" in (tmp_path / "README.md").read_text()
    loader = ShardLoader(f"{tmp_path}/train-*.tar", seed=0, batch_size=10, epochs=1)
    assert sum(len(batch) for batch in loader) == 60


@pytest.mark.parametrize(
    "flags", [["--shapes", "ring"], ["--class_samples", "2"], ["--selection_fraction", "0.2"]], ids=" ".join
)
def test_what_pairs_do_not_have_is_an_input_error(tmp_path, flags):
    with pytest.raises(InputError, match=f"{flags[0]} is of --scenes shapes"):
        main(parse(Config, ["--scenes", "pairs", *SMALL, *flags, "--output_dir", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_the_bytes_of_the_shapes_are_as_they_were(tmp_path):
    """Written down once: whoever has built them before finds the same data set."""
    flags = ["--splits", "selection", "--output_dir", str(tmp_path)]
    main(parse(Config, [*SMALL, *flags]))
    content = (tmp_path / "selection-000000.tar").read_bytes()
    texts = hashlib.sha256((tmp_path / "captions-selection.txt").read_bytes()).hexdigest()
    pixels = [s.image.tobytes() for s in iterate_shard(str(tmp_path / "selection-000000.tar"), BadSamples())]
    assert (hashlib.sha256(b"".join(pixels)).hexdigest()[:16], texts[:16]) == ("8f22e9c9adffe05f", "257a01adef1499e4")
    assert content.count(b"selection00000029.png") == 1
