"""The small text-to-image pipeline: latent diffusion as in Stable Diffusion, on pictures of 64 px, for a CPU.

Unlike `tiny`, it works on latents of a trained AutoencoderKL (see `train_autoencoder`).
"""

from __future__ import annotations

from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from mmbackdoor.models.autoencoder import latent_shape
from mmbackdoor.models.tiny import new_pipeline, new_unet


def small_pipeline(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, seed: int
) -> StableDiffusionPipeline:
    """A pipeline with an untrained U-Net around a trained text encoder and a trained autoencoder.

    The pictures have the size that the autoencoder was trained at; the U-Net is that of `configs/small_unet.json`.
    """
    channels, side, _ = latent_shape(autoencoder, autoencoder.config.sample_size)
    unet = new_unet(
        "small_unet",
        seed,
        cross_attention_dim=text_encoder.config.hidden_size,
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
    )
    return new_pipeline(text_encoder, tokenizer, autoencoder, unet)
