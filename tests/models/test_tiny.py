"""The tiny pipeline: exact autoencoder, stock classes."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import DiffusionSource, shipped
from mmbackdoor.models.tiny import identity_autoencoder, tiny_unet
from mmbackdoor.types import InputError


def test_the_autoencoder_is_exact():
    autoencoder = identity_autoencoder()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = autoencoder.encode(images).latents
    torch.testing.assert_close(latents * autoencoder.config.scaling_factor, images, atol=1e-6, rtol=0)
    torch.testing.assert_close(autoencoder.decode(latents).sample, images, atol=5e-4, rtol=0)


def test_a_seed_makes_the_same_network():
    first, same, other = (tiny_unet(64, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_shipped_model_is_a_stock_pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(shipped("tiny"))
    picture = pipe("a large red cross on a blue background", num_inference_steps=2).images[0]
    assert picture.size == (32, 32)
    assert {type(part).__module__.split(".")[0] for part in pipe.components.values() if part} <= {"diffusers", "transformers"}
    model = load(shipped("tiny"))
    assert model.resolution == 32 and model.latent_shape == (3, 32, 32) and model.prediction_type == "v_prediction"


def test_a_source_without_a_name_is_refused():
    with pytest.raises(InputError, match="pretrained_model_name_or_path"):
        DiffusionSource().path  # noqa: B018
    assert DiffusionSource("tiny").path.endswith("tiny")
    assert DiffusionSource("some/folder").path == "some/folder"
