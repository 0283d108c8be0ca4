"""Where the tensors of a CLIP text encoder lie in the weight files of folders and in one-file checkpoints."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mmbackdoor.models.clip_links import OPEN_CLIP_BLOCK
from mmbackdoor.types import InputError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Their names in a pipeline; SDXL has both."""
_TRANSFORMERS = {
    "text_encoder": (
        "cond_stage_model.transformer.text_model.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.text_model.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.transformer.text_model.",),
}
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
_QKV = re.compile(r"(encoder\.layers\.\d+\.self_attn\.)[qkv]_proj\.(weight|bias)")


def name_in_folder(name: str, names: Collection[str]) -> str:
    """`name` as a file of the encoder has it: older ones have `text_model.` before it."""
    bare = name.removeprefix("text_model.")
    return next((found for found in (name, f"text_model.{bare}", bare) if found in names), name)


def in_original_layout(
    part: str, changed: Collection[str], state: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Name in a one-file checkpoint with `names` -> value, for the tensors `changed` of the encoder `part`
    (`text_encoder` or SDXL's `text_encoder_2`) whose weights are `state`. Raises `InputError` where one has no place.
    """
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {}
    for name in (one.removeprefix("text_model.") for one in changed):
        stored = next((prefix + name for prefix in _TRANSFORMERS[part] if prefix + name in names), None)
        value = bare[name]
        if stored is None:
            stored, value = _open_clip(name, bare)
            stored = _OPEN_CLIP[part] + stored
        if stored not in names:
            raise InputError(
                f"the checkpoint has no place for {name!r} of the {part}; convert it to a diffusers folder first"
            )
        found[stored] = value
    return found


def _open_clip(name: str, state: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Name and value in open_clip's layout."""
    if fused := _QKV.fullmatch(name):
        layer, kind = fused.groups()
        parts = [state[f"{layer}{letter}_proj.{kind}"] for letter in "qkv"]
        return f"{_block(layer.removesuffix('self_attn.'))}attn.in_proj_{kind}", torch.cat(parts)
    if name == "text_projection.weight":
        return "text_projection", state[name].T
    if name == "embeddings.position_embedding.weight":
        return "positional_embedding", state[name]
    renamed = name.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
    for ours, theirs in OPEN_CLIP_BLOCK.items():
        renamed = renamed.replace(f".{theirs}.", f".{ours}.")
    return _block(renamed), state[name]


def _block(name: str) -> str:
    return name.replace("encoder.layers.", "transformer.resblocks.")
