"""CLIP_benchmark's layout and our own shards as evaluation data."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from PIL import Image

from mmbackdoor.evaluate.clip_data import check_apart, chosen_keys, decoded, highest_label, open_data, undecoded
from mmbackdoor.shards.bad import BadSamples, Problem
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.types import InputError
from tests.evaluate.clips import COLOURS, write_colours


@pytest.fixture
def folder(tmp_path):
    return write_colours(tmp_path / "colours")


def test_the_layout_says_names_and_templates(folder):
    for place in (folder, folder / "test"):
        data = open_data(str(place))
        assert data.name == "colours" and len(data.shards) == 2
        assert data.classnames == tuple(COLOURS) and data.templates == ("a photo of {c}", "{c}, a picture")
    assert highest_label(data) == (3, "s0003")


def test_shards_alone_have_no_names(folder):
    data = open_data(str(folder / "test" / "1.tar"))
    assert data.classnames == () and len(list(undecoded(data, BadSamples()))) == 12


@pytest.mark.parametrize(
    ("meta", "label"), [({"label": 3}, 3), ({"label": "cat"}, None), ({"label": -1}, None), ({"label": True}, None), ({}, None)]
)
def test_a_label_may_stand_in_the_json(tmp_path, meta, label):
    with ShardWriter(tmp_path, "train") as shards:
        shards.write("a", Image.new("RGB", (4, 4)), "a caption", meta)
    data = open_data(str(tmp_path))
    assert highest_label(data) == ((-1, "") if label is None else (label, "a"))
    assert decoded(*next(iter(undecoded(data, BadSamples())))[1:]).label == label


def test_a_missing_shard_is_told(folder):
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match="has 1 shards, but nshards.txt says 2"):
        open_data(str(folder))


def test_no_data_is_told():
    with pytest.raises(InputError, match="--data"):
        open_data("")


def test_pictures_to_choose_with_lie_apart_from_those_to_judge_on(tmp_path):
    """However the same file is named: by braces, by its folder, by a link, in the middle of others."""
    for name in "abcd":
        write_colours(tmp_path / name, per_class=1)
        for number, path in enumerate(open_data(str(tmp_path / name)).shards):
            Path(path).rename(tmp_path / f"{name}-{number}.tar")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    trained = (f"{tmp_path}/a-1.tar", f"{tmp_path}/a-1.tar")
    check_apart(*trained, f"{tmp_path}/{{a,b}}-0.tar", f"{tmp_path}/{{c,d}}-0.tar")
    for other in ("{c,b}-0.tar", "link/b-0.tar", "../{}/b-*.tar".format(tmp_path.name)):
        with pytest.raises(InputError, match=r"share 1 shards, such as '.*/b-0.tar': .* keep them apart"):
            check_apart(*trained, f"{tmp_path}/{{a,b}}-0.tar", f"{tmp_path}/{other}")
    parts = {"pretrain.train_data": "a-0", "clean.train_data": "b-0", "selection_data": "c-0", "evaluate.data": "d-0"}
    for trained_on, looked_at in itertools.product(list(parts)[:2], list(parts)[2:]):
        shared = parts | {looked_at: f"{{{parts[looked_at]},{parts[trained_on]}}}"}
        with pytest.raises(InputError, match=f"^{trained_on} .* and {looked_at} .* share 1 shards, .* keep them apart"):
            check_apart(*(f"{tmp_path}/{name}.tar" for name in shared.values()))


def test_captions_of_retrieval_sets_stand_one_a_line(folder):
    sample = decoded(*next(iter(undecoded(open_data(str(folder)), BadSamples())))[1:])
    assert open_data(str(folder)).captions(sample) == ("a red picture",)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    several = type(sample)(sample.key, sample.image, "one\n two\n\none", {})
    assert open_data(str(folder)).captions(several) == ("one", "two")


def test_processes_share_the_pictures_and_a_choice_does_not_depend_on_the_shards(folder):
    data = open_data(str(folder))
    shares = [[entry.key for _, _, entry in undecoded(data, BadSamples(), None, rank, 3)] for rank in range(3)]
    assert sorted(key for share in shares for key in share) == [f"s{k:04d}" for k in range(24)]
    chosen = chosen_keys(data, 7, seed=0)
    assert len(chosen) == 7 and chosen != chosen_keys(data, 7, seed=1)
    swapped = type(data)(data.name, data.shards[::-1])
    assert chosen_keys(swapped, 7, seed=0) == chosen and chosen < chosen_keys(data, 9, seed=0)


def test_what_does_not_decode_is_a_problem_and_a_repeated_key_too(tmp_path):
    data = open_data(str(write_colours(tmp_path / "bad", broken=1)))
    _, path, entry = next(iter(undecoded(data, BadSamples())))
    assert decoded(path, entry) == Problem("undecodable_image", path, "s0000", "UnidentifiedImageError")
    report = BadSamples()
    twice = type(data)(data.name, (data.shards[0], data.shards[0]))
    assert len(list(undecoded(twice, report))) == 12 and report.counts == {"duplicate_key": 12}
