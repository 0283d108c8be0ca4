"""Pictures of the teacher belong to their prompts, however they are batched, and are kept under a name that tells all that
decides them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

from mmbackdoor.evaluate.generate import Job, Sampling, sample_latents
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.shards.write import part_of
from mmbackdoor.train import latents
from mmbackdoor.train.latents import teacher_latents
from mmbackdoor.train.launch import make_accelerator

PROMPTS = ("a large red cross on a blue background", "a small pink ring on a green background", "a big blue square")
SAMPLING = Sampling(num_inference_steps=2, guidance_scale=2.0)


def made(model: DiffusionModel, folder: Path) -> torch.Tensor:
    return teacher_latents(model, ["a red cross"], 1, SAMPLING, folder, make_accelerator(), 2)["a red cross"]


@pytest.mark.parametrize("change", ["size", "class", "config"])
def test_another_size_or_scheduler_never_meets_old_files(tmp_path, change):
    model = load(shipped("tiny"))
    first = made(model, tmp_path)
    assert torch.equal(made(model, tmp_path), first) and len(list(tmp_path.iterdir())) == 1
    if change == "size":
        model = load(shipped("tiny"), resolution=64)
    elif change == "class":
        model.pipe.scheduler = EulerDiscreteScheduler.from_config(model.pipe.scheduler.config)
    else:
        own = model.pipe.scheduler
        model.pipe.scheduler = type(own).from_config(own.config, prediction_type="epsilon")
    other = made(model, tmp_path)
    assert other.shape[1:] == model.latent_shape and len(list(tmp_path.iterdir())) == 2
    assert other.shape != first.shape or not torch.equal(other, first)


def test_latents_are_those_of_their_prompt(tmp_path, monkeypatch):
    """Two of each prompt in batches of three: the second prompt's lie in both files."""
    model = load(shipped("tiny"))
    arguments = (model, PROMPTS, 2, SAMPLING, tmp_path / "latents", make_accelerator(), 3)
    found = teacher_latents(*arguments)
    assert list(found) == list(PROMPTS) and len(list((tmp_path / "latents").iterdir())) == 2
    rows = []
    for prompt in PROMPTS:
        name = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        for index in range(2):
            rows.append(found[prompt][index])
            alone = sample_latents(model, [Job(name, "teacher", prompt, index)], SAMPLING)[0]
            torch.testing.assert_close(found[prompt][index], alone, rtol=1e-3, atol=1e-3)
    apart = torch.cdist(torch.stack(rows).flatten(1), torch.stack(rows).flatten(1)) + 1e9 * torch.eye(6)
    assert apart.min() > 1

    def never(*_: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(latents, "sample_latents", never)
    again = teacher_latents(*arguments)
    assert all(torch.equal(again[prompt], found[prompt]) for prompt in PROMPTS)
    with pytest.raises(AssertionError, match="sampled again"):
        teacher_latents(model, PROMPTS[:2], *arguments[2:])


def test_processes_that_share_a_folder_write_aside_under_names_of_their_own(tmp_path, monkeypatch):
    model = load(shipped("tiny"))
    own = part_of(tmp_path / "0123.safetensors").name
    other = tmp_path / own.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    for path in (tmp_path / own, other):
        path.write_bytes(b"half")
    parts = []

    def noted(tensors: dict[str, torch.Tensor], path: Path) -> None:
        parts.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(latents, "save_file", noted)
    made(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert parts == [part_of(file)] and set(tmp_path.iterdir()) == {file, other}
