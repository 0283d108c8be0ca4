"""The whole measurement on CLIPs whose every answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.evaluate import clip_benchmark
from mmbackdoor.evaluate.checks import verdict
from mmbackdoor.evaluate.clip_conditions import KINDS, conditions, view
from mmbackdoor.evaluate.clip_data import open_data
from mmbackdoor.evaluate.clip_suite import ClipAmounts, evaluate_clips
from mmbackdoor.evaluate.entries import Entry
from mmbackdoor.evaluate.zeroshot import class_prompts
from mmbackdoor.results import record, report, samples, tables
from mmbackdoor.results.record import Record
from mmbackdoor.targets import ClassTarget, UnknownTarget
from mmbackdoor.triggers import IMAGE_TRIGGERS
from mmbackdoor.types import InputError
from tests.evaluate.clips import BACKDOOR, TARGET, rigged, write_colours

PER_CLASS = 80
MODELS = {
    "clean": Entry(lambda: rigged(False), "clean"),
    "poisoned": Entry(lambda: rigged(True, training=True), "poisoned", "data_poisoning"),
    "cleaned": Entry(lambda: rigged(False), "cleaned", "data_poisoning", "cleanclip"),
    "cleaned-2": Entry(lambda: rigged(False, blind=True), "cleaned", "data_poisoning", "garbage"),
}


def measure(
    folder: Path,
    data: Path,
    models: dict[str, Entry] = MODELS,
    backdoor: Backdoor | None = BACKDOOR,
    names: tuple[str, ...] | None = None,
    world_size: int = 1,
    **amounts: object,
) -> list[Record]:
    opened = open_data(str(data))
    classes = class_prompts(names or opened.classnames, opened.templates)
    options = {"out_dir": folder, "run_id": "r", "batch_size": 7, "world_size": world_size}
    for rank in range(world_size - 1, -1, -1):
        found, _ = evaluate_clips(
            models, opened, classes, backdoor, amounts=replace(ClipAmounts(neighbours=3, near_samples=40), **amounts),
            rank=rank, **options,
        )  # fmt: skip
        assert found or rank
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data") / "colours", PER_CLASS)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    record.replace(folder / "results.jsonl", measure(folder, data))
    return folder


def values(records: list[Record]) -> dict[tuple[str | None, str, str], Record]:
    return {(one.model["id"], one.metric, one.condition): one for one in records}


def test_accuracy_and_attack_of_every_model(run):
    found = values(record.read(run))
    shown = {
        name: [found[key].value for column in tables.HEADLINE if (key := (name, *column)) in found]
        for name in MODELS
    }
    # ASR with the trigger, top-1 clean, top-1 with the trigger
    assert shown == {
        "clean": [0.0, 1.0, 1.0],
        "poisoned": [1.0, 1.0, 0.0],
        "cleaned": [0.0, 1.0, 1.0],
        "cleaned-2": [0.0, 0.25, 1 / 3],
    }


def test_the_target_class_is_left_out_and_n_says_so(run):
    found = values(record.read(run))
    asr, top1 = found["poisoned", "asr", "triggered"], found["poisoned", "top1", "clean"]
    assert (top1.n, asr.n) == (4 * PER_CLASS, 3 * PER_CLASS)
    assert asr.notes["not_counted"] == PER_CLASS and found["poisoned", "top1", "triggered"].n == asr.n
    assert asr.ci_method == "wilson" and asr.ci_low > 0.97


def test_differences_are_those_to_the_clean_pictures_of_the_poisoned_model(run):
    found = values(record.read(run))
    change = {key[1:]: found["cleaned", *key[1:]].value for key in found if key[1].endswith("_difference")}
    # With the trigger the poisoned model knows no class: against that any garbage would be a gain.
    assert change == {
        ("top1_difference", "clean"): 0.0, ("top1_difference", "triggered"): 0.0, ("asr_difference", "triggered"): -1.0
    }  # fmt: skip


def test_without_the_text_encoder(run):
    found = values(record.read(run))
    for way in ("knn", "prototype"):
        assert found["poisoned", f"{way}_top1", "clean"].value == 1.0
        assert found["poisoned", f"{way}_asr", "triggered"].value == 1.0
        assert found["cleaned", f"{way}_asr", "triggered"].value == 0.0


def test_the_trigger_moves_nothing_in_a_model_without_the_backdoor(run):
    found = values(record.read(run))
    assert found["cleaned", "w1", "triggered"].value == found["cleaned", "displacement", "triggered"].value == 0
    moved = found["poisoned", "w1", "triggered"]
    assert moved.value > 0.5 and moved.ci_low is None
    assert moved.value <= moved.notes["paired"] + 1e-6


def test_retrieval_counts_any_picture_with_the_caption(run):
    found = values(record.read(run))
    for metric in ("text_retrieval_recall@1", "image_retrieval_recall@1"):
        assert found["poisoned", metric, "clean"].value == 1.0
    assert found["poisoned", "text_retrieval_recall@1", "triggered"].value == 0.25


def test_near_triggers_are_measured_on_fewer_pictures(run):
    found = values(record.read(run))
    assert found["poisoned", "asr", "near:unseen:codec"].value == 1.0
    # The corner of the model's backdoor is empty there.
    assert found["poisoned", "asr", "near:unseen:position"].value == 0.0
    assert found["poisoned", "top1", "near:unseen:position"].value == 1.0
    assert found["poisoned", "asr", "near:unseen:codec"].n <= 40


def test_the_verdict_tells_a_removal_from_garbage(run):
    rows = record.read(run)
    one = verdict([row for row in rows if row.model["id"] != "cleaned-2"])
    assert one.verdict == "removed", one.sentence
    assert "top-1 100.0 -> 100.0" in one.sentence
    both = verdict(rows)
    assert both.verdict == "not removed" and "cleaned-2" in both.sentence
    assert any("on clean pictures broke down" in reason for reason in both.reasons)


def test_the_report_and_the_grid_show_pictures_with_predictions(run):
    page = report.build(run).read_text()
    assert "Marks near the trigger" in page and "Same pictures" in page and "predicted yellow" in page
    assert "plain prompt" not in page and "Spellings" not in page and "file missing" not in page
    assert (run / "grid.png").stat().st_size > 2000
    pictures = samples.read(run)
    assert len(pictures) == len(MODELS) * (2 * 4 * PER_CLASS + 3 * 40)
    fired = [one for one in pictures if one.model == "poisoned" and one.condition == "triggered" and one.score("asr")]
    assert {one.scores["predicted"] for one in fired} == {TARGET} and len(fired) == 3 * PER_CLASS
    assert (run / fired[0].image).parent.is_dir() and not (run / "embeddings").exists()


def test_no_table_shows_asr_without_accuracy(run):
    header = tables.headline(record.read(run)).header
    asr = header.index("ASR, triggered")
    assert header[asr + 1 : asr + 3] == ("top-1, clean", "top-1, triggered")


def test_clip_benchmarks_form(run, tmp_path):
    files = clip_benchmark.write(tmp_path, record.read(run), {"poisoned": "runs/x/model"})
    assert [file.stem for file in files] == ["poisoned-zeroshot_classification", "poisoned-zeroshot_retrieval"]
    content = json.loads(files[0].read_text())
    assert content.keys() == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert content["metrics"] == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    assert json.loads(files[1].read_text())["metrics"]["image_retrieval_recall@5"] == 1.0


def small(load: Callable[[], object] = lambda: rigged(True)) -> dict[str, Entry]:
    return {"poisoned": Entry(load, "poisoned")}


def test_processes_together_measure_what_one_does(tmp_path):
    data = write_colours(tmp_path / "data", 5)
    one = measure(tmp_path / "one", data, small())
    three = measure(tmp_path / "three", data, small(), world_size=3)
    assert one == three
    assert (tmp_path / "one/samples.jsonl").read_text() == (tmp_path / "three/samples.jsonl").read_text()


def test_a_share_that_is_there_is_not_made_again(tmp_path):
    data = write_colours(tmp_path / "data", 4)
    loads = []

    def load():
        loads.append(1)
        return rigged(True)

    options = {"out_dir": tmp_path / "run", "run_id": "r", "rank": 1, "world_size": 2}
    opened = open_data(str(data))
    classes = class_prompts(opened.classnames, opened.templates)
    for _ in range(2):
        evaluate_clips(small(load), opened, classes, BACKDOOR, **options)
    assert len(loads) == 1
    evaluate_clips(small(load), opened, classes, BACKDOOR, seed=1, **options)
    assert len(loads) == 2


def test_pictures_that_do_not_decode_are_counted_and_told(tmp_path):
    data = write_colours(tmp_path / "data", 5, broken=3)
    records = measure(tmp_path / "run", data, small())
    assert values(records)["poisoned", "top1", "clean"].n == 17
    assert any("3 x undecodable_image" in warning for warning in records[0].warnings)
    with pytest.raises(InputError, match="none of the pictures.*undecodable_image"):
        measure(tmp_path / "none", write_colours(tmp_path / "all", 1, broken=4), small())


def test_names_that_lack_the_target_or_a_label_are_told_before_any_model_is_loaded(tmp_path):
    data = write_colours(tmp_path / "data", 2)

    def never():
        raise AssertionError("loaded")

    with pytest.raises(InputError, match="'yellow' is none of the 4 class names"):
        measure(tmp_path / "run", data, small(never), names=("red", "green", "blue", "lime"))
    with pytest.raises(InputError, match=r"label 3, but there are 3 class names"):
        measure(tmp_path / "run", data, small(never), names=("red", "green", "yellow"))


def test_a_broken_head_is_told(tmp_path):
    """Prompts in the wrong order: the pictures can be told apart, but not by them."""
    data = write_colours(tmp_path / "data", 10)
    records = measure(tmp_path / "run", data, small(), names=("green", "blue", "red", "yellow"))
    assert values(records)["poisoned", "top1", "clean"].value == 0.25
    told = " ".join(records[0].warnings + values(records)["poisoned", "top1", "clean"].warnings)
    assert "zero-shot prompts are unlike the captions" in told and "nearest neighbours reach 100.0 %" in told


def test_equal_class_names_count_as_one_class(tmp_path):
    data = write_colours(tmp_path / "data", 10)
    records = measure(tmp_path / "run", data, small(), names=("red", "green", "red", "yellow"))
    # Blue pictures carry the name red: half of the pictures of that name are recognised.
    assert values(records)["poisoned", "top1", "clean"].value == 0.75


def test_without_a_trigger_or_a_target_what_is_missing_is_told(tmp_path):
    data = write_colours(tmp_path / "data", 10)
    records = measure(tmp_path / "a", data, small(), backdoor=None)
    assert {one.condition for one in records} == {"clean"} and "no trigger" in records[0].notes["not_measured"]["asr"]
    unknown = replace(BACKDOOR, target=UnknownTarget())
    found = values(measure(tmp_path / "b", data, small(), backdoor=unknown))
    assert ("poisoned", "asr", "triggered") not in found and found["poisoned", "displacement", "triggered"].value > 0.5


def test_pictures_without_labels_are_retrieved_only(tmp_path):
    data = write_colours(tmp_path / "data", 3)
    opened = replace(open_data(str(data)), classnames=())
    found, _ = evaluate_clips(small(), opened, None, BACKDOOR, out_dir=tmp_path / "run", run_id="r")
    assert {one.metric.split("@")[0] for one in found} == {
        "text_retrieval_recall", "image_retrieval_recall", "displacement", "w1",
    }  # fmt: skip
    assert "no labels" in found[0].notes["not_measured"]["top1"]


def test_a_part_of_the_pictures_is_the_same_part_for_every_model(tmp_path):
    data = write_colours(tmp_path / "data", 10)
    records = measure(tmp_path / "run", data, {name: MODELS[name] for name in ("poisoned", "cleaned")}, num_samples=12)
    assert {one.n for one in records if one.metric == "top1" and one.condition == "clean"} == {12}
    assert values(records)["cleaned", "top1_difference", "clean"].n == 12


@pytest.mark.parametrize("place", ["source", "input"])
def test_clean_and_triggered_go_through_the_same_resize_and_crop(place):
    picture = Image.new("RGB", (40, 24), (10, 20, 30))
    ImageDraw.Draw(picture).rectangle((14, 4, 26, 20), fill=(200, 100, 0))
    cfg = rigged(False).preprocess_cfg
    patch = IMAGE_TRIGGERS["patch"](pattern="solid", size=0.25, place=place)
    clean, triggered = conditions(Backdoor((patch,), ClassTarget("x")), ())
    first, second = (view(cfg, picture, "k", one, 0) for one in (clean, triggered))
    assert first.size == second.size == (16, 16)
    # Outside of the patch and its resampled edge nothing differs.
    assert [first.getpixel((x, y)) for x in range(10) for y in range(10)] == [
        second.getpixel((x, y)) for x in range(10) for y in range(10)
    ]
    assert min(second.getpixel((15, 15))) > 150 > max(first.getpixel((15, 15)))


@pytest.mark.parametrize("name", sorted(IMAGE_TRIGGERS))
def test_near_triggers_differ_from_the_trigger_in_one_thing(name):
    trigger = IMAGE_TRIGGERS[name]()
    found = conditions(Backdoor((trigger,), ClassTarget("x")), KINDS)
    assert {"clean", "triggered", "near:unseen:codec", "near:unseen:place"} <= {one.name for one in found}
    for one in found[2:]:
        (near,) = one.backdoor.triggers
        changed = [field for field in vars(trigger) if vars(trigger)[field] != vars(near)[field]]
        assert len(changed) == (0 if one.squash else 1)
