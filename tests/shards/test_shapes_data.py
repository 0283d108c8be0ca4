from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbackdoor.evaluate.metrics.shapes import recognise
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.shards.shapes import Scene, all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import captions_of, write_shapes
from mmbackdoor.types import InputError

SCENES = split_scenes(all_scenes())


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_bytes_depend_on_the_settings_alone(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        shards = write_shapes(tmp_path / name, "selection", SCENES["selection"], 1100, 8, seed=4, workers=workers)
        assert [shard.name for shard in shards] == ["selection-000000.tar", "selection-000001.tar"]
    assert content(tmp_path / "one") == content(tmp_path / "two")
    write_shapes(tmp_path / "other", "selection", SCENES["selection"], 1100, 8, seed=5)
    assert content(tmp_path / "one")["selection-000000.tar"] != content(tmp_path / "other")["selection-000000.tar"]


def test_a_sample_does_not_depend_on_the_number_of_samples(tmp_path):
    write_shapes(tmp_path / "few", "train", SCENES["train"], 10, 16, samples_per_shard=3)
    write_shapes(tmp_path / "many", "train", SCENES["train"], 30, 16)

    def samples(folder):
        found = [s for path in expand(folder) for s in iterate_shard(path, BadSamples())]
        return [(s.key, s.text, s.meta, s.image.tobytes()) for s in found]

    assert samples(tmp_path / "few") == samples(tmp_path / "many")[:10]


def test_pictures_show_what_caption_and_json_say(tmp_path):
    write_shapes(tmp_path, "evaluation", SCENES["evaluation"], 2 * len(SCENES["evaluation"]), 32)
    captions = set((tmp_path / "captions-evaluation.txt").read_text().splitlines())
    samples = list(iterate_shard(str(tmp_path / "evaluation-000000.tar"), BadSamples()))
    scenes = [Scene(*(s.meta[name] for name in ("shape", "colour", "background", "size", "position"))) for s in samples]
    assert all(s.text in captions and s.text == s.meta["caption"] and s.meta["split"] == "evaluation" for s in samples)
    assert all(scene.key == s.meta["scene"] and scene.colour in s.text for scene, s in zip(scenes, samples))
    # Every scene comes once in each round.
    half = len(SCENES["evaluation"])
    assert set(scenes[:half]) == set(scenes[half:]) == set(SCENES["evaluation"]) and scenes[:half] != scenes[half:]
    images = np.stack([np.asarray(s.image) for s in samples[:100]])
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert sum(found == scene for found, scene in zip(recognise(pictures), scenes)) >= 98


def test_writing_again_keeps_what_is_there_or_refuses(tmp_path):
    shards = write_shapes(tmp_path, "train", SCENES["train"], 20, 8)
    times = [shard.stat().st_mtime_ns for shard in shards]
    assert write_shapes(tmp_path, "train", SCENES["train"], 20, 8) == shards
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    with pytest.raises(InputError, match="--overwrite"):
        write_shapes(tmp_path, "train", SCENES["train"], 21, 8)
    write_shapes(tmp_path, "train", SCENES["train"], 21, 8, overwrite=True)
    assert sum(1 for _ in iterate_shard(str(shards[0]), BadSamples())) == 21
    shards[0].unlink()
    write_shapes(tmp_path, "train", SCENES["train"], 21, 8)
    assert shards[0].is_file()


def test_captions_of_splits_are_disjoint_and_impossible_splits_refused(tmp_path):
    captions = {split: set(captions_of(scenes)) for split, scenes in SCENES.items()}
    assert not captions["train"] & captions["evaluation"] and not captions["train"] & captions["selection"]
    assert not captions["selection"] & captions["evaluation"]
    with pytest.raises(InputError, match="impossible"):
        write_shapes(tmp_path, "train", [], 5, 32)
    with pytest.raises(InputError, match="impossible"):
        write_shapes(tmp_path, "train", SCENES["train"], 0, 32)
    assert not list(tmp_path.iterdir())
