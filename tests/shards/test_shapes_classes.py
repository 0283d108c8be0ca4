"""The pictures to classify: layout, labels, held-out combinations, prompts like the captions."""

from __future__ import annotations

import pytest

from mmbackdoor.evaluate.clip_data import open_data
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.read import iterate_shard
from mmbackdoor.shards.shapes import SHAPES, all_scenes, split_scenes
from mmbackdoor.shards.shapes_classes import class_name, classnames, templates, write_shapes_classes
from mmbackdoor.shards.shapes_data import captions_of
from mmbackdoor.types import InputError

SCENES = split_scenes(all_scenes(SHAPES))
HELD_OUT = SCENES["evaluation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shapes_classes(
        tmp_path_factory.mktemp("x") / "classes", HELD_OUT, 3, samples_per_shard=100, extra_classes=["yellow cat"]
    )


def test_it_is_clip_benchmarks_layout(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "classnames.txt", "shapes_classes.json", "test", "zeroshot_classification_templates.txt",
    ]  # fmt: skip
    assert (folder / "test/nshards.txt").read_text() == "2\n"
    names = (folder / "classnames.txt").read_text().splitlines()
    assert len(names) == 49 and names[-1] == "yellow cat" and len(open_data(str(folder)).shards) == 2


def test_labels_are_those_of_the_names_and_every_class_has_as_many(folder):
    report, names = BadSamples(), open_data(str(folder)).classnames
    samples = [sample for path in open_data(str(folder)).shards for sample in iterate_shard(path, report)]
    assert not report.total and len(samples) == 3 * 48
    assert all(names[sample.meta["label"]] in sample.text for sample in samples)
    counts = [sum(sample.meta["label"] == label for sample in samples) for label in range(48)]
    assert set(counts) == {3}


def test_combinations_are_held_out(folder):
    trained = {scene.key for scene in SCENES["train"]}
    samples = [sample for path in open_data(str(folder)).shards for sample in iterate_shard(path, BadSamples())]
    assert not {sample.meta["scene"] for sample in samples} & trained


def test_prompts_are_captions_that_training_has(folder):
    names, texts = classnames(HELD_OUT), templates(HELD_OUT)
    prompts = {text.replace("{c}", name) for text in texts for name in names}
    every = set(captions_of(all_scenes(SHAPES)))
    # Only a shape on its own colour is in no caption: one background of eight.
    assert len(prompts & every) == len(prompts) * 7 // 8
    assert len({text.split(" on ")[-1].split(" of ")[-1] for text in texts}) >= 8


def test_the_same_settings_change_nothing_and_others_are_refused(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in before}
    write_shapes_classes(folder, HELD_OUT, 3, samples_per_shard=100, extra_classes=["yellow cat"])
    assert {path: path.stat().st_mtime_ns for path in before} == times
    with pytest.raises(InputError, match="other settings"):
        write_shapes_classes(folder, HELD_OUT, 2)
    write_shapes_classes(folder, HELD_OUT, 3, samples_per_shard=100, extra_classes=["yellow cat"], overwrite=True)
    assert {path: path.read_bytes() for path in before} == before


def test_a_class_that_no_scene_shows_is_told(tmp_path):
    some = [scene for scene in HELD_OUT if class_name(scene) != "red cross"]
    with pytest.raises(InputError, match="no scene shows 'red cross'"):
        write_shapes_classes(tmp_path / "x", some, 1)
