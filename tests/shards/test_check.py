from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.check import check, info, split
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.types import InputError
from tests.shards.samples import good, tar_bytes, write_set


def test_good_shards_have_no_problems(hundred):
    report = check(hundred)
    assert report.ok and (report.shards, report.samples) == (12, 101)
    assert str(report) == "12 shards, 101 good samples, no problems"


@pytest.mark.parametrize("workers", [1, 2])
def test_every_problem_is_named_with_shard_and_key(tmp_path, workers):
    write_set(tmp_path, 4, 2)
    bad = [part for number in range(9) for part in [(f"bad{number}.png", b"x"), (f"bad{number}.txt", b"t")]]
    (tmp_path / "set-000002.tar").write_bytes(tar_bytes(good("fine") + bad))
    (tmp_path / "sizes.json").write_text(json.dumps({"set-000000.tar": 2, "set-000001.tar": 3, "set-000002.tar": 10}))
    report = check(tmp_path, workers)
    assert not report.ok and report.samples == 5
    assert report.problems.counts == {"wrong_size": 1, "undecodable_image": 9}
    text = str(report)
    assert all(f"set-000002.tar: 'bad{number}'" in text for number in range(9))
    assert "set-000001.tar: sizes.json gives another number of samples than the shard holds (3 stated, 2 found)" in text


def test_info_counts_and_shows_a_sample(hundred):
    text = str(info(hundred))
    assert text.startswith("12 shards, 101 samples, ") and "4 x 4 .png" in text and "'caption 0'" in text


@pytest.mark.parametrize("count", [1, 4, 40, 101])
def test_split_keeps_every_sample_and_makes_even_shards(hundred, tmp_path, count):
    report = split(hundred, tmp_path / "out", count)
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert len(sizes) == count == report.shards and sum(sizes.values()) == 101
    assert max(sizes.values()) - min(sizes.values()) <= 1

    def content(spec):
        samples = [s for path in expand(spec) for s in iterate_shard(path, BadSamples())]
        return [(s.key, s.text, s.meta, s.image.tobytes()) for s in samples]

    assert content(tmp_path / "out") == content(hundred)


def test_split_into_impossible_numbers_is_an_input_error(hundred, tmp_path):
    for count in (0, 102):
        with pytest.raises(InputError, match="from 1 to 101"):
            split(hundred, tmp_path / "out", count)
    assert not (tmp_path / "out").exists()


def test_split_refuses_keys_that_occur_twice_and_leaves_nothing(tmp_path):
    for name in ("a-0.tar", "a-1.tar"):
        (tmp_path / name).write_bytes(tar_bytes(good("same")))
    with pytest.raises(InputError, match="'same' occurs in two shards"):
        split(tmp_path, tmp_path / "out", 1)
    assert not list((tmp_path / "out").iterdir())


def test_chores_import_no_torch():
    modules = "mmbackdoor.shards.check, mmbackdoor.shards.loader, mmbackdoor.shards.shapes_data, mmbackdoor.poison"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
