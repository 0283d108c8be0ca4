"""The small pipeline and its autoencoder: stock classes, right shapes, latents of unit scale, back to pictures."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from mmbackdoor.models.autoencoder import Reconstructor, latent_shape, load_autoencoder, small_autoencoder
from mmbackdoor.models.clip import build_tiny_clip
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.small import small_pipeline
from mmbackdoor.models.text_encoder import to_clip_text_model
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.types import InputError

CAPTIONS = ["a red cross above a blue ring", "a green square left of a yellow triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved small pipeline with random weights and a scaling factor of its own."""
    clip = build_tiny_clip("clip_tiny_resnet", train_tokenizer(CAPTIONS, 560, 32))
    autoencoder = small_autoencoder(0)
    autoencoder.register_to_config(scaling_factor=0.5)
    path = tmp_path_factory.mktemp("small") / "model"
    small_pipeline(*to_clip_text_model(clip), autoencoder, seed=0).save_pretrained(path)
    return path


def test_it_is_a_stock_pipeline_of_64_pixels(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipe.vae) is AutoencoderKL and pipe.vae_scale_factor == 2
    assert pipe(CAPTIONS[0], num_inference_steps=2).images[0].size == (64, 64)
    model = load(folder)
    assert model.resolution == 64 and model.latent_shape == (4, 32, 32) and model.prediction_type == "v_prediction"
    assert model.max_length == 32 and model.encode(CAPTIONS).hidden_states.shape == (2, 32, 64)


def test_pictures_go_through_the_autoencoder_with_its_scaling_factor(folder):
    model, autoencoder = load(folder), AutoencoderKL.from_pretrained(folder / "vae")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images(images)
    with torch.no_grad():
        mean = autoencoder.encode(images).latent_dist.mode()
        pictures = autoencoder.decode(mean).sample
    torch.testing.assert_close(latents, 0.5 * mean)
    torch.testing.assert_close(model.decode(latents), pictures)


def test_a_seed_makes_the_same_networks(folder):
    first, same, other = (small_autoencoder(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_sizes_are_those_of_the_autoencoder(folder):
    clip = build_tiny_clip("clip_tiny_resnet", train_tokenizer(CAPTIONS, 560))
    autoencoder = AutoencoderKL(
        latent_channels=3, sample_size=32, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = DiffusionModel(small_pipeline(*to_clip_text_model(clip), autoencoder, seed=0))
    assert model.resolution == 32 and model.latent_shape == (3, 16, 16) and model.max_length == 24


def test_an_autoencoder_comes_from_its_folder_or_from_a_pipelines(folder):
    whole, part = load_autoencoder(str(folder)), load_autoencoder(str(folder / "vae"))
    assert whole.config.scaling_factor == 0.5 and whole.dtype == torch.float32
    assert all(torch.equal(tensor, part.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_what_is_no_autoencoder_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="'AutoencoderTiny', but an AutoencoderKL"):
        load_autoencoder("tiny")
    with pytest.raises(InputError, match="holds no autoencoder"):
        load_autoencoder(str(tmp_path))
    with pytest.raises(InputError, match="'UNet2DConditionModel', but an AutoencoderKL"):
        load_autoencoder(str(folder / "unet"))
    shutil.copytree(folder / "vae", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(InputError, match="other"):
        load_autoencoder(str(tmp_path / "other"))
    with pytest.raises(InputError, match="resolution 31 is no multiple of 2"):
        latent_shape(small_autoencoder(0), 31)


def test_a_fresh_autoencoder_starts_with_little_noise_and_plain_layers():
    autoencoder = small_autoencoder(0)
    with torch.no_grad():
        posterior = autoencoder.encode(torch.rand(2, 3, 16, 16) * 2 - 1).latent_dist
    assert posterior.logvar.unique().tolist() == [-6] and posterior.mean.std() > 0.1
    block = autoencoder.decoder.mid_block.resnets[0]
    hidden = torch.rand(1, 32, 4, 4)
    assert torch.equal(block(hidden, None), hidden)


def test_the_forward_pass_is_the_autoencoders_with_the_given_noise():
    autoencoder = small_autoencoder(0)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = autoencoder.encode(images).latent_dist
        expected = autoencoder.decode(posterior.mean + (posterior.logvar / 2).exp() * noise).sample
        pictures, mean, log_variance = Reconstructor(autoencoder)(images, noise)
    torch.testing.assert_close(pictures, expected)
    assert torch.equal(mean, posterior.mean) and torch.equal(log_variance, posterior.logvar)
