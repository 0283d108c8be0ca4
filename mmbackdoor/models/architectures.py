"""Pipelines of the published architectures with random weights, built offline from packaged configs.

`width_divisor` (2, 4 or 8) divides every width and keeps depth, block types and vocabulary: for tests.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mmbackdoor.models.folder import assemble, quiet
from mmbackdoor.models.tokenizers import clip_vocabulary_tokenizer
from mmbackdoor.seeding import derive_seed
from mmbackdoor.types import InputError

Architecture = Literal["sd15", "sd21_base", "sd21_v", "sdxl"]
ARCHITECTURES: tuple[Architecture, ...] = ("sd15", "sd21_base", "sd21_v", "sdxl")
DIVISORS = (1, 2, 4, 8)
_PAD = {"sd15": ("<|endoftext|>",), "sd21_base": ("!",), "sd21_v": ("!",), "sdxl": ("<|endoftext|>", "!")}
_WIDTHS = (
    "block_out_channels", "norm_num_groups", "cross_attention_dim", "projection_class_embeddings_input_dim",
    "addition_time_embed_dim", "hidden_size", "intermediate_size", "projection_dim",
)  # fmt: skip


def config_folder(name: Architecture) -> Path:
    """The packaged diffusers configs of `name`: model_index.json, a folder a part, without tokenizers and weights."""
    return Path(str(resources.files("mmbackdoor.models") / "configs" / name))


def tokenizers(name: Architecture) -> dict[str, Any]:
    """The real CLIP tokenizers of `name`, by the names of the pipeline's parts."""
    parts = zip(("tokenizer", "tokenizer_2"), _PAD[name], strict=False)
    return {part: clip_vocabulary_tokenizer(pad) for part, pad in parts}


def sd15(width_divisor: int = 1, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: 859.5 M parameters in the UNet, epsilon prediction, 64 x 64 latents."""
    return _random("sd15", width_divisor, seed)


def sd21_base(width_divisor: int = 1, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 2.1 base: epsilon prediction, 64 x 64 latents."""
    return _random("sd21_base", width_divisor, seed)


def sd21_v(width_divisor: int = 1, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 2.1: 865.9 M parameters in the UNet, v-prediction, 96 x 96 latents."""
    return _random("sd21_v", width_divisor, seed)


def sdxl(width_divisor: int = 1, seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL base: 2567 M parameters in the UNet, two text encoders, 128 x 128 latents."""
    return _random("sdxl", width_divisor, seed)


def _random(name: Architecture, divisor: int, seed: int) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    if divisor not in DIVISORS:
        raise InputError(f"the width divisor {divisor} is none of {', '.join(map(str, DIVISORS))}")
    folder = config_folder(name)
    parts: dict[str, Any] = dict(tokenizers(name))
    index = _read(folder / "model_index.json")
    # Constructors draw from the global generator: fork it, so that a caller's own draws do not move.
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(derive_seed(seed, "architecture", name))
        parts["unet"] = UNet2DConditionModel.from_config(_narrow(_read(folder / "unet/config.json"), divisor))
        parts["vae"] = AutoencoderKL.from_config(_narrow(_read(folder / "vae/config.json"), divisor))
        parts["text_encoder"] = CLIPTextModel(_text_config(folder / "text_encoder", divisor))
        if name == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text_config(folder / "text_encoder_2", divisor))
    scheduler = getattr(diffusers, index["scheduler"][1])
    parts["scheduler"] = scheduler.from_config(_read(folder / "scheduler/scheduler_config.json"))
    return assemble(parts, index)


def _text_config(folder: Path, divisor: int) -> CLIPTextConfig:
    return CLIPTextConfig(**_narrow(_read(folder / "config.json"), divisor))


def _narrow(config: dict[str, Any], divisor: int) -> dict[str, Any]:
    def narrow(value: Any) -> Any:
        return [part // divisor for part in value] if isinstance(value, list) else value // divisor

    return {key: narrow(value) if key in _WIDTHS else value for key, value in config.items()}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
