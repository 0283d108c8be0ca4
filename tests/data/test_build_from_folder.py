from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.build_from_folder import Config, main
from mmbackdoor.config import parse
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.check import check
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.types import InputError


def build(folder: Path, *flags: str) -> tuple[list, dict[str, int]]:
    report = main(parse(Config, ["--input_dir", str(folder / "in"), "--output_dir", str(folder / "out"), *flags]))
    problems = BadSamples()
    samples = [s for path in expand(folder / "out") for s in iterate_shard(path, problems)]
    assert not problems.total and check(folder / "out").ok
    return samples, report.counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub é").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "sub é/c.webp", "sub é/d.PNG"]):
        Image.new("RGB", (40, 20), (number, 0, 0)).save(tmp_path / "in" / name, quality=95, lossless=True)
    return tmp_path


def captions_beside(folder: Path) -> None:
    for name in ("a", "b", "sub é/c", "sub é/d"):
        (folder / "in" / f"{name}.txt").write_text(f"caption of {name}\n", encoding="utf-8")


def test_captions_beside_the_images(folder):
    captions_beside(folder)
    samples, bad = build(folder)
    assert not bad
    assert [s.text for s in samples] == [f"caption of {name}" for name in ("a", "b", "sub é/c", "sub é/d")]
    assert [s.meta["file"] for s in samples] == ["a.png", "b.jpg", "sub é/c.webp", "sub é/d.PNG"]
    assert [s.image.getpixel((0, 0)) for s in samples][::2] == [(0, 0, 0), (2, 0, 0)]
    assert all(s.meta["width"] == 40 and s.meta["caption"] == s.text for s in samples)


def test_csv_and_jsonl_carry_further_columns(folder):
    (folder / "list.csv").write_text('\ufefffile,caption,source\na.png,"one, quoted",web\nb.jpg,two,own\n', "utf-8")
    samples, bad = build(folder, "--captions", str(folder / "list.csv"), "--prefix", "set")
    assert [(s.text, s.meta["source"]) for s in samples] == [("one, quoted", "web"), ("two", "own")] and not bad
    assert (folder / "out" / "set-000000.tar").is_file()
    rows = [{"file": "a.png", "text": "one", "label": 3}, {"file_name": "b.jpg", "caption": "two"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    samples, bad = build(folder, "--captions", str(folder / "list.jsonl"), "--prefix", "set", "--overwrite")
    assert [s.text for s in samples] == ["one", "two"] and samples[0].meta["label"] == 3 and not bad


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--resolution", "10"], (20, 10)),
        (["--resolution", "10", "--resize", "center_crop"], (10, 10)),
        (["--resolution", "10", "--resize", "stretch"], (10, 10)),
        (["--image_format", "png"], (40, 20)),
    ],
    ids=str,
)
def test_resizing_and_formats(folder, flags, size):
    captions_beside(folder)
    samples, bad = build(folder, *flags)
    assert {s.image.size for s in samples} == {size} and len(samples) == 4 and not bad
    assert {(s.meta["width"], s.meta["height"]) for s in samples} == {size}


def test_files_that_are_kept_are_bit_equal(folder):
    captions_beside(folder)
    build(folder)
    data = (folder / "out" / "train-000000.tar").read_bytes()
    assert all((folder / "in" / name).read_bytes() in data for name in ("a.png", "b.jpg", "sub é/c.webp"))


def test_bad_files_are_left_out_and_counted(folder):
    captions_beside(folder)
    inside = folder / "in"
    (inside / "b.txt").write_bytes("café".encode("latin-1"))
    (inside / "sub é" / "c.txt").unlink()
    for name, data in {"e.png": b"no picture", "f.png": b"", "g.jpg": (inside / "a.png").read_bytes()}.items():
        (inside / name).write_bytes(data)
        (inside / name).with_suffix(".txt").write_text("t")
    Image.new("RGB", (4, 4)).save(inside / "h.png")
    (inside / "h.txt").write_text("a" * 100_000)
    (inside / "z.png").symlink_to("/nowhere/x.png")
    samples, bad = build(folder)
    assert [s.meta["file"] for s in samples] == ["a.png", "sub é/d.PNG"]
    assert bad == {
        "not_utf8": 1,
        "missing_caption": 1,
        "undecodable_image": 1,
        "empty_member": 1,
        "mislabelled_image": 1,
        "long_caption": 1,
        "outside_folder": 1,
    }


def test_bad_rows_are_left_out_and_counted(folder):
    (folder / "secret.png").write_bytes((folder / "in" / "a.png").read_bytes())
    lines = [
        b'{"file": "a.png", "text": "good"}',
        b'{"file": "../secret.png", "text": "t"}',
        b'{"file": "%s", "text": "t"}' % os.fsencode(folder / "secret.png"),
        b'{"file": "none.png", "text": "t"}',
        b'{"file": "x\\u0000.png", "text": "t"}',
        b'{"file": "a.png", "text": "\xe9"}',
        b'{"file": "a.png", "text": "\\ud800"}',
        b'{"file": "a.png"}',
        b'{"text": "t"}',
        b"{",
        b"[]",
    ]
    (folder / "list.jsonl").write_bytes(b"\n".join(lines))
    samples, bad = build(folder, "--captions", str(folder / "list.jsonl"))
    assert [s.text for s in samples] == ["good"]
    assert sum(bad.values()) == 10 and bad["outside_folder"] == 2 and bad["bad_json"] == 2


@pytest.mark.parametrize("name", ["list.csv", "empty.csv", "huge.csv", "list.txt", "none.jsonl"])
def test_wrong_lists_are_input_errors_and_nothing_is_written(folder, name):
    (folder / "list.csv").write_text("image,title\na.png,one\n")
    (folder / "empty.csv").write_text("")
    (folder / "huge.csv").write_text("file,caption\na.png," + "a" * 200_000)
    (folder / "list.txt").write_text("a.png one")
    with pytest.raises(InputError, match=name):
        build(folder, "--captions", str(folder / name))
    assert not list((folder / "out").iterdir())


def test_a_folder_without_anything_usable_is_an_input_error(folder):
    with pytest.raises(InputError, match="4 missing_caption"):
        build(folder)
    with pytest.raises(InputError, match="is no folder"):
        build(folder / "in")


def test_the_script_runs(folder):
    captions_beside(folder)
    (folder / "in" / "a.txt").unlink()
    script = str(Path(__file__).parents[2] / "data" / "build_from_folder.py")
    command = [sys.executable, script, "--input_dir", str(folder / "in"), "--output_dir", str(folder / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(script).parents[1])}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "3 samples in 1 shards, 1 left out" in output and "a.png" in output
