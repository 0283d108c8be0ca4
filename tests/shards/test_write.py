from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.shards.write import ShardWriter, part_of
from mmbackdoor.types import InputError
from tests.shards.samples import write_set


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_samples_come_back_as_they_went(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for image_format in ("png", "webp", "jpg"):
        with ShardWriter(tmp_path, f"my-{image_format}", image_format=image_format) as writer:
            writer.write("folder/key", image, "a “quoted” caption", {"label": 3})
        report = BadSamples()
        sample = next(iterate_shard(str(tmp_path / f"my-{image_format}-000000.tar"), report))
        assert (sample.key, sample.text) == ("folder/key", "a “quoted” caption") and not report.total
        assert sample.meta == {"caption": "a “quoted” caption", "label": 3}
        assert np.array_equal(np.asarray(sample.image), image) == (image_format != "jpg")


def test_the_bytes_are_deterministic_and_name_no_one(tmp_path):
    for name in ("one", "two"):
        write_set(tmp_path / name, 11, 4)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "set-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_sizes_of_several_sets_in_a_folder(tmp_path):
    write_set(tmp_path, 5, 2, "a")
    write_set(tmp_path, 3, 2, "b")
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes == {"a-000000.tar": 2, "a-000001.tar": 2, "a-000002.tar": 1, "b-000000.tar": 2, "b-000001.tar": 1}


def test_webdataset_and_tarfile_read_what_we_write(tmp_path):
    write_set(tmp_path, 5, 5)
    found = list(webdataset.WebDataset(expand(tmp_path), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"k{number:05d}" for number in range(5)]
    assert Image.open(io.BytesIO(found[3]["png"])).getpixel((0, 0)) == (3, 3, 3)
    assert found[3]["txt"] == b"caption 3" and json.loads(found[3]["json"]) == {"caption": "caption 3", "n": 3}


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path, "set", 2) as writer:
            for number in range(5):
                writer.write(f"k{number}", np.zeros((2, 2, 3), np.uint8), "t", {})
            assert not list(tmp_path.glob("*.tar"))
            raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / "set-000007.tar.part").write_bytes(b"half")
    write_set(tmp_path, 3, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["set-000000.tar", "set-000001.tar", "sizes.json"]


def write_elsewhere(folder: Path, count: int) -> None:
    """In a process of its own, as another call would."""
    code = f"from pathlib import Path; from tests.shards.samples import write_set; write_set(Path({str(folder)!r}), {count}, 2)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_calls_side_by_side_write_the_same_shards(tmp_path):
    write_set(tmp_path / "alone", 3, 2)
    with ShardWriter(tmp_path / "both", "set", 2) as writer:
        for number in range(3):
            if number == 1:
                write_elsewhere(tmp_path / "both", 3)
            image = np.full((4, 4, 3), number, np.uint8)
            writer.write(f"k{number:05d}", image, f"caption {number}", {"n": number})
    assert digests(tmp_path / "both") == digests(tmp_path / "alone")


def test_other_shards_that_another_call_has_written_meanwhile_are_kept(tmp_path):
    with pytest.raises(InputError, match="set-000000.tar"):
        with ShardWriter(tmp_path, "set", 2) as writer:
            writer.write("k", np.zeros((2, 2, 3), np.uint8), "t", {})
            write_elsewhere(tmp_path, 3)
    write_set(tmp_path.with_name("alone"), 3, 2)
    assert digests(tmp_path) == digests(tmp_path.with_name("alone"))


def test_only_what_no_process_will_finish_is_cleared(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    host = part_of(Path("x")).name.split(".")[1]
    gone = [f"set-000000.tar.{host}.{process}.part" for process in (done.pid, os.getpid())]
    kept = [f"set-000000.tar.{owner}.part" for owner in (f"{host}.{os.getppid()}", f"{host}-2.{done.pid}")]
    for name in (*gone, *kept):
        (tmp_path / name).write_bytes(b"half")
    with ShardWriter(tmp_path, "set"):
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_old_shards_are_kept_unless_overwritten_and_then_none_stays(tmp_path):
    write_set(tmp_path, 6, 2)
    before = digests(tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        ShardWriter(tmp_path, "set")
    assert digests(tmp_path) == before
    with ShardWriter(tmp_path, "set", 10, overwrite=True) as writer:
        writer.write("k", np.zeros((2, 2, 3), np.uint8), "t", {})
    assert sorted(digests(tmp_path)) == ["set-000000.tar", "sizes.json"]
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"set-000000.tar": 1}


def test_wrong_settings_and_keys(tmp_path):
    for options in ({"image_format": "gif"}, {"samples_per_shard": 0}, {"prefix": "../x"}):
        with pytest.raises(InputError):
            ShardWriter(tmp_path, **({"prefix": "set"} | options))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be made"):
        ShardWriter(tmp_path / "file" / "sub", "set")
    pixel = np.zeros((1, 1, 3), np.uint8)
    with ShardWriter(tmp_path, "set") as writer:
        writer.write("good", pixel, "t", {})
        for key in ("good", "a.b", "../x", "/x", "a\nb"):
            with pytest.raises(ValueError, match="key"):
                writer.write(key, pixel, "t", {})
        with pytest.raises(ValueError, match="none of"):
            writer.write_members("new", {"pkl": b""})
