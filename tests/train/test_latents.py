"""Pictures of the teacher are kept under a name that tells all that decides them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from mmbackdoor.evaluate.generate import Sampling
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.train.latents import teacher_latents
from mmbackdoor.train.launch import make_accelerator

SAMPLING = Sampling(num_inference_steps=1)


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
