"""What a defender without the trigger sees of a CLIP; and the pictures of the benchmark it sees them on."""

from __future__ import annotations

import inspect
import json
import tarfile
from pathlib import Path

import pytest
import torch

from mmbackdoor.evaluate import clip_sight
from mmbackdoor.evaluate.clip_data import chosen_keys, open_data
from mmbackdoor.evaluate.clip_sight import Kept, drift, features, read_selection, utility
from mmbackdoor.evaluate.zeroshot import class_prompts
from mmbackdoor.models.clip import build_tiny_clip
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.shards.shapes_benchmark import BenchmarkShapes, benchmark_data, write_benchmark_shapes
from mmbackdoor.types import InputError

SHAPES = BenchmarkShapes(train_samples=40, clean_samples=30, evaluation_per_class=1, selection_per_class=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    write_benchmark_shapes(folder, SHAPES, "yellow cat")
    return folder


def scenes(folder: Path, pattern: str) -> set[str]:
    found = set()
    for path in folder.glob(pattern):
        with tarfile.open(path) as archive:
            found |= {
                json.load(archive.extractfile(member))["scene"] for member in archive if member.name.endswith(".json")
            }
    return found


def test_nothing_is_measured_on_what_was_trained_or_selected_on(folder):
    train, clean = scenes(folder, "train-*.tar"), scenes(folder, "clean-*.tar")
    selection, evaluation = scenes(folder, "selection/test/*.tar"), scenes(folder, "evaluation/test/*.tar")
    assert len(train) == 40 and len(clean) == 30 and len(selection) == len(evaluation) == 48
    assert not (train | clean) & (selection | evaluation) and not selection & evaluation
    assert (folder / "train-000000.tar").read_bytes() != (folder / "clean-000000.tar").read_bytes()
    names = [(folder / part / "classnames.txt").read_text().splitlines() for part in ("evaluation", "selection")]
    assert len(names[0]) == 49 and names[0][-1] == "yellow cat" and names[1] == names[0][:-1]
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    write_benchmark_shapes(folder, SHAPES, "yellow cat")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == again


def test_utility_is_accuracy_and_drift_the_way_of_the_embeddings(folder):
    data = open_data(benchmark_data(folder).selection)
    selection = read_selection(data, class_prompts(data.classnames, data.templates))
    assert len(selection.images) == 48 and sorted(selection.labels.tolist()) == list(range(48))
    classes, few = class_prompts(data.classnames, data.templates), chosen_keys(data, 7, 0)
    assert len(read_selection(data, classes, few).images) == 7 < len(read_selection(data, classes, None).images)
    clip = build_tiny_clip("clip_tiny_vit", train_tokenizer(["a red cross"], 520))
    vectors = features(clip, selection, batch_size=20)
    assert vectors.shape == (48, 64) and torch.allclose(vectors, features(clip, selection), atol=1e-5)
    assert drift(vectors, vectors) == pytest.approx(0, abs=1e-6)
    assert drift(vectors, -vectors) == pytest.approx(2) and drift(vectors, vectors.roll(1, 1)) > 0.1
    assert 0 <= utility(clip, vectors, selection) < 0.3, "random weights"
    centres = clip_sight.class_vectors(clip, selection.classes)
    assert utility(clip, centres[selection.labels], selection) > 0.9
    clip.network.train()
    assert torch.allclose(features(clip, selection), vectors, atol=1e-5), "in evaluation mode, whatever it was left in"


def test_what_is_looked_at_has_a_name_that_changes_with_it(folder):
    data = open_data(benchmark_data(folder).selection)
    classes, other = (class_prompts(data.classnames, of) for of in (data.templates, ("a {}",)))
    evaluation = open_data(benchmark_data(folder).evaluation)
    some = [Kept(data, classes), Kept(data, other), Kept(data, classes, chosen_keys(data, 7, 0)),
            Kept(data, classes, chosen_keys(data, 8, 0)), Kept(evaluation, classes)]  # fmt: skip
    assert len({one.sha256 for one in some}) == len(some)
    again = Kept(open_data(benchmark_data(folder).selection), classes, chosen_keys(data, 7, 0))
    assert again.sha256 == some[2].sha256 and len(again.pictures.images) == 7


def test_labels_without_names_and_pictures_without_labels_are_refused(folder):
    data = open_data(benchmark_data(folder).selection)
    with pytest.raises(InputError, match="only 2 class names"):
        read_selection(data, class_prompts(["red cross", "red ring"], ("a {}",)))
    with pytest.raises(InputError, match="none has a label"):
        read_selection(open_data(f"{folder}/train-*.tar"), class_prompts(["red cross", "red ring"], ("a {}",)))


def test_no_trigger_can_be_reached():
    source = inspect.getsource(clip_sight)
    imported = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    hidden = ("mmbackdoor.backdoor", "poison", "triggers", "targets", "record", "samples")
    assert len(imported) > 5 and not any(word in line for line in imported for word in hidden)
