"""The smallest stock pipelines, with random weights, for tests of evaluation."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def scheduler(kind=DDIMScheduler, **changes):
    given = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", steps_offset=1, prediction_type="v_prediction")
    return kind(**(given | changes))


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip


def unet(**changes):
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, **changes,
    )  # fmt: skip


def text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tiny_pipe(tokenizer):
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config(tokenizer)), tokenizer=tokenizer,
        unet=unet(cross_attention_dim=16), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
