"""The tiny text-to-image pipeline: a stock `StableDiffusionPipeline` made of the real classes, small enough for a CPU.

Its autoencoder is exact (identity weights), so pictures are the latents and a verdict about them is about the U-Net.
"""

from __future__ import annotations

import json
from importlib.resources import files

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

LATENT_SCALE = 0.1
"""The decoder of AutoencoderTiny clamps by 3 tanh(z / 3), which is linear for latents this small."""


def identity_autoencoder() -> AutoencoderTiny:
    """An AutoencoderTiny whose latents are the picture times `LATENT_SCALE`: encode and decode are exact to 4e-4."""
    autoencoder = AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(6,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=1 / LATENT_SCALE,
    )
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
        first, second = (layer for layer in autoencoder.encoder.layers if isinstance(layer, torch.nn.Conv2d))
        decode_first, decode_second = (
            layer for layer in autoencoder.decoder.layers if isinstance(layer, torch.nn.Conv2d)
        )
        for channel in range(3):
            # The encoder is given pictures in [0, 1]; latents are k * (2 x - 1).
            first.weight[channel, channel, 1, 1] = 1.0
            second.weight[channel, channel, 1, 1] = 2 * LATENT_SCALE
            second.bias[channel] = -LATENT_SCALE
            # The decoder has a ReLU after its first layer, so the two signs take separate channels.
            decode_first.weight[channel, channel, 1, 1] = 1.0
            decode_first.weight[channel + 3, channel, 1, 1] = -1.0
            decode_second.weight[channel, channel, 1, 1] = 0.5 / LATENT_SCALE
            decode_second.weight[channel, channel + 3, 1, 1] = -0.5 / LATENT_SCALE
            decode_second.bias[channel] = 0.5
    return autoencoder.eval().requires_grad_(False)


def new_unet(config: str, seed: int, **sizes: int) -> UNet2DConditionModel:
    """The U-Net of `configs/CONFIG.json`, completed by `sizes`, with fresh weights drawn from `seed`."""
    settings = json.loads(files("mmbackdoor.models").joinpath(f"configs/{config}.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**settings, **sizes)


def tiny_unet(text_width: int, seed: int) -> UNet2DConditionModel:
    """The U-Net of `configs/tiny_unet.json` with fresh weights drawn from `seed`."""
    return new_unet("tiny_unet", seed, cross_attention_dim=text_width)


def new_pipeline(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL | AutoencoderTiny,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """A stock pipeline of these parts that predicts v, with a scheduler for few steps."""
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=autoencoder.eval().requires_grad_(False),
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_pipeline(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, seed: int) -> StableDiffusionPipeline:
    """A pipeline with an untrained U-Net around a trained text encoder."""
    unet = tiny_unet(text_encoder.config.hidden_size, seed)
    return new_pipeline(text_encoder, tokenizer, identity_autoencoder(), unet)
