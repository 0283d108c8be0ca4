"""Whether the parts of a pipeline make one text-conditioned model."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from mmbackdoor.types import InputError


def cross_attention_layers(unet: nn.Module) -> list[str]:
    """Names of the UNet's text cross-attention modules."""
    return [name for name, _ in unet.named_modules() if name.endswith(".attn2")]


def check_pipeline(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> None:
    """Raise `InputError` where the parts do not make a text-conditioned model."""
    if not cross_attention_layers(pipe.unet):
        raise InputError(
            "this checkpoint's UNet has no cross-attention to text; give a Stable-Diffusion-like text-to-image model"
        )
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise InputError(
            f"the UNet takes {pipe.unet.config.in_channels} channels but the autoencoder gives "
            f"{pipe.vae.config.latent_channels}; inpainting, depth and upscaling models are not supported"
        )
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if isinstance(pipe, StableDiffusionXLPipeline):
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    width = 0
    for tokenizer, text_encoder in pairs:
        width += text_encoder.config.hidden_size
        rows, positions = text_encoder.config.vocab_size, text_encoder.config.max_position_embeddings
        highest = max(tokenizer.get_vocab().values())
        if highest >= rows:
            raise InputError(
                f"the tokenizer's highest id {highest} does not fit the text encoder's {rows} token embeddings; "
                "use the tokenizer that belongs to this text encoder"
            )
        if tokenizer.model_max_length > positions:
            raise InputError(
                f"the tokenizer's model_max_length {tokenizer.model_max_length} is above the text encoder's "
                f"{positions} positions; set model_max_length in tokenizer_config.json"
            )
    wanted = pipe.unet.config.cross_attention_dim
    if isinstance(wanted, int) and wanted != width:
        raise InputError(
            f"the UNet attends to text of width {wanted} but the text encoder gives {width}; "
            "these parts belong to different models"
        )
