"""Real pictures as the reference of KID and the Frechet distance."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmbackdoor.evaluate.metrics import clip_score
from mmbackdoor.evaluate.reference import Reference
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.types import InputError


class Corner:
    """Features: colour of the upper left pixel, and how large the picture was."""

    logit_scale = 1.0

    def image_features(self, images):
        return torch.cat([images[:, :, 0, 0], torch.full((len(images), 1), float(images.shape[-1]))], 1)

    def text_features(self, texts):
        raise AssertionError("no text is read")


def write(folder, count, samples_per_shard=10, size=(8, 8)):
    with ShardWriter(folder, "real", samples_per_shard) as shards:
        for k in range(count):
            shards.write(f"s{k:03d}", Image.new("RGB", size, (k, 0, 255)), "a caption", {})
    return f"{folder}/real-*.tar"


def reds(features):
    return sorted(round((value.item() + 1) * 127.5) for value in features[:, 0])


def test_every_picture_at_the_size_that_models_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_score, "BATCH", 4)
    spec = write(tmp_path, 25, size=(12, 20))
    reference = Reference.of(spec, None)
    found = reference.features(Corner(), 6)
    assert reference.name == f"pictures of {spec}" and found.dtype == torch.float32
    assert reds(found) == list(range(25)) and set(found[:, 3].tolist()) == {6.0} and found[0, 2] == 1


def test_the_choice_of_pictures_does_not_depend_on_shards(tmp_path):
    some = [Reference.of(write(tmp_path / str(size), 25, size), 7).features(Corner(), 8) for size in (10, 25)]
    assert len(some[0]) == 7 and reds(some[0]) == reds(some[1]) and reds(some[0]) != list(range(7))


def test_what_has_no_two_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="fewer than two pictures"):
        Reference.of(write(tmp_path, 1), None)
    with pytest.raises(InputError):
        Reference.of(str(tmp_path / "nothing-*.tar"), None)


@pytest.mark.parametrize("broken", [2, 3])
def test_pictures_that_cannot_be_read_are_left_out(tmp_path, broken):
    spec = write(tmp_path, 4)
    file = tmp_path / "real-000000.tar"
    file.write_bytes(file.read_bytes().replace(b"\x89PNG", b"none", broken))
    reference = Reference.of(spec, None)
    if broken == 2:
        assert reds(reference.features(Corner(), 8)) == [2, 3]
        return
    with pytest.raises(InputError, match="fewer than two pictures .* can be read; .*`mmbackdoor shards check`"):
        reference.features(Corner(), 8)
