"""The text tower of an open_clip model as a transformers `CLIPTextModel`, for pipelines that expect one."""

from __future__ import annotations

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmbackdoor.models.clip import ClipModel
from mmbackdoor.models.text_layout import OPEN_CLIP_BLOCK
from mmbackdoor.models.tokenizers import clip_vocabulary_tokenizer
from mmbackdoor.types import InputError

UNKNOWN_TO_TRANSFORMERS = (
    "embed_cls", "no_causal_mask", "ls_init_value", "final_ln_after_pool", "block_type", "qk_norm", "act_kwargs",
    "norm_kwargs", "hf_model_name", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc",
)  # fmt: skip


def to_clip_text_model(clip: ClipModel) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text tower of `clip` and its tokenizer: the same hidden states after the last LayerNorm, for every position,
    and the same pooled state before the projection.

    Padding: an own vocabulary pads with its end-of-text token, like Stable Diffusion 1; the tower is causal, so what
    precedes the padding never depends on it, but a UNet attends to the padding's states too. open_clip's own 49k
    tokenizer pads with 0, like Stable Diffusion 2; the tokenizer returned for it pads with the end of text.

    Raises InputError for a tower that a `CLIPTextModel` cannot express.
    """
    text_cfg = clip.model_cfg["text_cfg"]
    foreign = [name for name in UNKNOWN_TO_TRANSFORMERS if text_cfg.get(name)]
    if foreign:
        raise InputError(f"The text tower of {clip.source!r} has {', '.join(foreign)}, which no CLIPTextModel has.")
    tower = clip.network if isinstance(clip.network, open_clip.CLIP) else clip.network.text
    tokenizer = _tokenizer(clip)
    if tokenizer.eos_token_id == 2:
        raise InputError("transformers reads end-of-text id 2 as the highest id of a caption: use another vocabulary.")
    width = text_cfg.get("width", 512)
    config = CLIPTextConfig(
        vocab_size=tower.token_embedding.num_embeddings,
        hidden_size=width,
        intermediate_size=int(width * text_cfg.get("mlp_ratio", 4.0)),
        projection_dim=clip.model_cfg["embed_dim"],
        num_hidden_layers=text_cfg.get("layers", 12),
        num_attention_heads=text_cfg.get("heads", 8),
        max_position_embeddings=text_cfg.get("context_length", 77),
        hidden_act="quick_gelu" if clip.model_cfg.get("quick_gelu") else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    model.load_state_dict(_renamed(tower))
    return model.to(clip.device).eval(), tokenizer


def _tokenizer(clip: ClipModel) -> CLIPTokenizer:
    if isinstance(clip.tokenizer, HFTokenizer):
        return clip.tokenizer.tokenizer
    return clip_vocabulary_tokenizer()


@torch.no_grad()
def _renamed(tower: torch.nn.Module) -> dict[str, Tensor]:
    state = {
        "embeddings.token_embedding.weight": tower.token_embedding.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        "final_layer_norm.weight": tower.ln_final.weight,
        "final_layer_norm.bias": tower.ln_final.bias,
    }
    for index, block in enumerate(tower.transformer.resblocks):
        layer = f"encoder.layers.{index}"
        for ours, theirs in OPEN_CLIP_BLOCK.items():
            module = block.get_submodule(ours)
            state |= {f"{layer}.{theirs}.weight": module.weight, f"{layer}.{theirs}.bias": module.bias}
        for kind in ("weight", "bias"):
            for part, values in zip("qkv", block.attn.get_parameter(f"in_proj_{kind}").chunk(3), strict=True):
                state[f"{layer}.self_attn.{part}_proj.{kind}"] = values
    return {name: tensor.detach().clone() for name, tensor in state.items()}
