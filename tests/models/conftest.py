"""Tiny pipelines of the real classes with random weights, as folders, one-file checkpoints and LoRA files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mmbackdoor.models.vocabulary import train_tokenizer

CAPTIONS = ["a photo of a red square", "a blue circle on a green background", "a yellow cross, left"]
FAMILIES = ["sd", "sd2", "sdxl"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build() -> Callable[[str], StableDiffusionPipeline | StableDiffusionXLPipeline]:
    """A new pipeline of a family: sd (1.x), sd2 (v-prediction, linear projections), sdxl, sdxl-empty (no zeros)."""
    return _build


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str, torch.dtype], Path]:
    """A saved folder of a family in a dtype, made once: read it only."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            path = tmp_path_factory.mktemp("pipelines") / family
            _build(family).to(dtype=dtype).save_pretrained(path)
            made[family, dtype] = path
        return made[family, dtype]

    return folder


@pytest.fixture(scope="session")
def original_file() -> Callable[..., Path]:
    return _write_original


@pytest.fixture(scope="session")
def lora_file() -> Callable[..., Path]:
    return _write_lora


def _text_config(tokens: CLIPTokenizer, width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokens.model_max_length,
        projection_dim=width,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def _build(family: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokens = train_tokenizer(CAPTIONS, 600, 16)
    unet = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 8,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(16, 16),
            norm_num_groups=8,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        ),
        "text_encoder": CLIPTextModel(_text_config(tokens)),
        "tokenizer": tokens,
    }
    if family.startswith("sdxl"):
        unet |= {
            "cross_attention_dim": 32 + 40,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 6 * 8,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        }
        return StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokens, 40)),
            tokenizer_2=train_tokenizer(CAPTIONS, 600, 16),
            unet=UNet2DConditionModel(**unet),
            scheduler=EulerDiscreteScheduler(**noise, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=family == "sdxl",
            add_watermarker=False,
        )
    if family == "sd2":
        unet |= {"use_linear_projection": True, "attention_head_dim": (2, 4)}
        noise["prediction_type"] = "v_prediction"
    return StableDiffusionPipeline(
        **parts,
        unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# -- the original layout of one-file checkpoints --------------------------------------------------------
def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for new, old in pairs:
        name = name.replace(new, old)
    return name


_RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
]
_TOP = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
]


def _original_unet_name(name: str, unet: UNet2DConditionModel) -> str:
    step = unet.config.layers_per_block + 1
    part = name.split(".")
    if part[0] == "mid_block":
        place = {"resnets": {"0": 0, "1": 2}, "attentions": {"0": 1}}[part[1]][part[2]]
        rest = ".".join(part[3:])
        return f"middle_block.{place}.{_renamed(rest, _RESNET) if part[1] == 'resnets' else rest}"
    if part[0] in ("down_blocks", "up_blocks"):
        block, kind, layer, rest = int(part[1]), part[2], int(part[3]), ".".join(part[4:])
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * step}.0.op.{part[-1]}"
        if kind == "upsamplers":
            after = 2 if unet.config.up_block_types[block].startswith("CrossAttn") else 1
            return f"output_blocks.{block * step + step - 1}.{after}.conv.{part[-1]}"
        down = part[0] == "down_blocks"
        place = f"input_blocks.{1 + block * step + layer}" if down else f"output_blocks.{block * step + layer}"
        return f"{place}.0.{_renamed(rest, _RESNET)}" if kind == "resnets" else f"{place}.1.{rest}"
    return _renamed(name, _TOP)


def _original_vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
    pairs = [
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.block.0", "mid.block_1"),
        ("mid_block.block.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
        ("conv_norm_out", "norm_out"),
    ]
    return _renamed(name, pairs)


def _original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    state = {
        _original_vae_name(name, len(vae.config.block_out_channels)): value for name, value in vae.state_dict().items()
    }
    return {
        name: value[:, :, None, None] if "attn_1" in name and value.dim() == 2 else value
        for name, value in state.items()
    }


def _open_clip(encoder: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    pairs = [
        ("encoder.layers", "transformer.resblocks"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("final_layer_norm", "ln_final"),
        ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
    ]
    original = {
        _renamed(name, pairs): value for name, value in state.items() if "_proj." not in name or "out_proj" in name
    }
    for layer in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            original[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    original.pop("text_projection.weight", None)
    original["text_projection"] = encoder.text_projection.weight.T.contiguous()
    return original


def _write_original(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, file: Path, ema: bool = False) -> Path:
    """The weights of an SD 1 or SDXL pipeline in the original one-file layout."""
    state = {
        f"model.diffusion_model.{_original_unet_name(name, pipe.unet)}": value
        for name, value in pipe.unet.state_dict().items()
    }
    if ema:
        state |= {
            "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in state.items()
        }
    state |= {f"first_stage_model.{name}": value for name, value in _original_vae(pipe.vae).items()}
    text = {f"transformer.text_model.{name}": value for name, value in pipe.text_encoder.state_dict().items()}
    if isinstance(pipe, StableDiffusionXLPipeline):
        state |= {f"conditioner.embedders.0.{name}": value for name, value in text.items()}
        state |= {
            f"conditioner.embedders.1.model.{name}": value for name, value in _open_clip(pipe.text_encoder_2).items()
        }
    else:
        state |= {f"cond_stage_model.{name}": value for name, value in text.items()}
    state = {name: value.clone().contiguous() for name, value in state.items()}
    if file.suffix == ".safetensors":
        save_file(state, file, {"format": "pt", "note": "kept"})
    else:
        torch.save({"state_dict": state}, file)
    return file


# -- LoRA files -----------------------------------------------------------------------------------------
def _write_lora(family: str, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random LoRA of rank 2 on the attention of the UNet and the text encoder: `kind` is diffusers or kohya."""
    pipe = _build(family)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for prefix, module, targets in (
        ("unet", pipe.unet, ["to_k", "to_v", "to_q", "to_out.0"]),
        ("text_encoder", pipe.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    ):
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        for name, value in get_peft_model_state_dict(module).items():
            name = name.replace(".default", "")
            factors[f"{prefix}.{name}"] = (0.3 * torch.randn(value.shape, generator=generator)).to(dtype)
    if kind == "diffusers":
        type(pipe).save_lora_weights(
            folder,
            unet_lora_layers={k.removeprefix("unet."): v for k, v in factors.items() if k.startswith("unet.")},
            text_encoder_lora_layers={
                k.removeprefix("text_encoder."): v for k, v in factors.items() if "unet." not in k
            },
        )
        return folder / "pytorch_lora_weights.safetensors"
    state = {}
    for name, value in factors.items():
        name = name.replace("text_encoder.encoder", "text_encoder.text_model.encoder")
        layer, factor = name.replace(".weight", "").rsplit(".", 1)
        prefix, layer = layer.split(".", 1)
        te = "te1" if family == "sdxl" else "te"
        layer = ("lora_unet_" if prefix == "unet" else f"lora_{te}_") + layer.replace(".", "_")
        state[f"{layer}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value
        state[f"{layer}.alpha"] = torch.tensor(1.0, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "kohya.safetensors", {"ss_network_dim": "2"})
    return folder / "kohya.safetensors"
