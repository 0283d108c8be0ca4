"""Models from strangers: what does not belong together is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.types import InputError

TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A path with spaces, letters of other scripts and markup."""
    return Path(shutil.copytree(shipped("tiny"), tmp_path / "mein Modell é 写真 <b>&"))


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def grow_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"stranger{number}": len(vocabulary) + number for number in range(9)}
    file.write_text(json.dumps(content))


def damage(file: Path, change) -> None:
    state = load_file(file)
    save_file(change(state), file, {"format": "pt"})


def first_matrix(state):
    return next(name for name in sorted(state) if state[name].ndim == 2)


CASES = {
    "tokenizer with more tokens than the encoder knows": (grow_vocabulary, "has .* tokens, its text encoder knows"),
    "tokenizer that gives longer sequences": (
        lambda folder: change_json(folder / "tokenizer/tokenizer_config.json", model_max_length=9999),
        "gives 9999 tokens",
    ),
    "NaN in the text encoder": (
        lambda folder: damage(folder / TEXT, lambda state: state | {first_matrix(state): state[first_matrix(state)] * torch.nan}),
        "NaN",
    ),
    "wrong shape in the text encoder": (
        lambda folder: damage(folder / TEXT, lambda state: state | {first_matrix(state): torch.zeros(2, 3)}),
        "text_encoder",
    ),
    "header of a terabyte": (
        lambda folder: (folder / TEXT).write_bytes(b"\xff" * 8 + b"{}" * 100), "safetensors"
    ),
    "header that is no JSON": (
        lambda folder: (folder / TEXT).write_bytes((4).to_bytes(8, "little") + b"{{{{"), "safetensors"
    ),
    "offsets beyond the file": (
        lambda folder: (folder / TEXT).write_bytes(
            len(header := b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}').to_bytes(8, "little") + header
        ),
        "cut short",
    ),
    "config of another class": (
        lambda folder: change_json(folder / "model_index.json", text_encoder=["os", "system"]), "system"
    ),
    "deep JSON": (lambda folder: (folder / "unet/config.json").write_text("[" * 200_000), "unet"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_stranger_s_model_is_refused_in_a_sentence(name, folder):
    harm, said = CASES[name]
    harm(folder)
    with pytest.raises(InputError, match=said) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_the_same_model_is_loaded_from_a_path_with_spaces_and_unicode(folder):
    assert load(folder).resolution == 32
