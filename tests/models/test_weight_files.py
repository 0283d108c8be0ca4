from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbackdoor.models import weight_files
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.models.weight_files import read_header, rewrite, sha256_at, weights_sha256
from mmbackdoor.types import Diverged, InputError, RunFault


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.safetensors"
    tensors = {
        "b": torch.arange(6, dtype=torch.float16).view(2, 3),
        "a": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        "n": torch.arange(3),
    }
    save_file(tensors, path, {"format": "pt"})
    return path


def test_rewriting_nothing_copies_the_bytes(source, tmp_path):
    rewrite(source, tmp_path / "out", {})
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


def test_replaced_tensors_take_the_stored_dtype_and_dropped_ones_go(source, tmp_path):
    rewrite(source, tmp_path / "out", {"b": torch.full((2, 3), 7.0)}, lambda name: name != "a")
    new = load_file(tmp_path / "out")
    assert set(new) == {"b", "n"}
    assert torch.equal(new["b"], torch.full((2, 3), 7.0, dtype=torch.float16)) and torch.equal(
        new["n"], torch.arange(3)
    )
    assert read_header(tmp_path / "out")["__metadata__"] == {"format": "pt"}


def test_what_cannot_be_stored_is_refused(source, tmp_path):
    with pytest.raises(RunFault, match="shape"):
        rewrite(source, tmp_path / "out", {"b": torch.zeros(3, 2)})
    with pytest.raises(Diverged, match="not finite"):
        rewrite(source, tmp_path / "out", {"b": torch.full((2, 3), 1e6)})
    with pytest.raises(RunFault, match="'zz'"):
        rewrite(source, tmp_path / "out", {"zz": torch.zeros(1)})
    with pytest.raises(InputError, match="I64"):
        rewrite(source, tmp_path / "out", {"n": torch.zeros(3)})


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b'\x0a\0\0\0\0\0\0\0{"a": {}}  '])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="no readable safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_the_hash_of_a_folder_follows_names_and_contents_of_weights_only(source, tmp_path):
    first = weights_sha256(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert weights_sha256(tmp_path) == first
    source.rename(tmp_path / "other.safetensors")
    assert weights_sha256(tmp_path) != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weights"):
        weights_sha256(tmp_path / "empty")


def test_a_large_file_is_read_once_until_it_changes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_BLOCK", 16)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(source.read_bytes())
    first = weights_sha256(folder)
    reads = []
    digest = weight_files.hashlib.file_digest
    monkeypatch.setattr(weight_files.hashlib, "file_digest", lambda *given: reads.append(given) or digest(*given))
    assert weights_sha256(folder) == first and not reads
    time = (folder / "a.safetensors").stat().st_mtime_ns
    (folder / "a.safetensors").write_bytes(source.read_bytes()[:-1] + b"x")
    os.utime(folder / "a.safetensors", ns=(time + 1, time + 1))
    assert weights_sha256(folder) != first and len(reads) == 1


def test_what_a_flag_names_is_hashed_where_it_lies_here(source, tmp_path):
    assert sha256_at(str(source)) == weights_sha256(source) and sha256_at("tiny_judge")
    assert [sha256_at(place) for place in (None, "", "owner/name", str(tmp_path / "none"))] == [None] * 4
    (tmp_path / "empty").mkdir()
    assert sha256_at(str(tmp_path / "empty")) is None
    base = DiffusionSource(str(source))
    assert base.sha256 == weights_sha256(source) and DiffusionSource("owner/name").sha256 is None
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(source.read_bytes() + b"x")
    assert DiffusionSource(str(source), lora=str(lora)).sha256 == f"{weights_sha256(source)}+{weights_sha256(lora)}"
