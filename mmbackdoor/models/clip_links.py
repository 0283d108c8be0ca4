"""Which tensor of an open_clip network is which of a transformers `CLIPModel` or `SiglipModel`.

The numbers are the same; a projection may be transposed, and query, key and value lie in one tensor or in three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
"""open_clip's names of the parts of a block, and those of transformers; attention's projections are fused."""
TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attn.proj": "self_attn.out_proj",
}


@dataclass(frozen=True)
class Link:
    """`ours` and `theirs` hold the same numbers. One name each: reshaped, or transposed. One name on one side and
    several on the other: the several stacked along their first dimension."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False

    def read(self, theirs: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        """The tensors of `ours`, of `shapes`. Raises ValueError where they do not fit."""
        return _restacked([one.T for one in theirs] if self.transposed else theirs, shapes)

    def write(self, ours: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        """The tensors of `theirs`, of `shapes`."""
        return _restacked([one.T for one in ours] if self.transposed else ours, shapes)


def _restacked(parts: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
    parts = [torch.cat(parts)] if len(parts) > len(shapes) else parts
    parts = list(parts[0].split([shape[0] for shape in shapes])) if len(parts) < len(shapes) else parts
    for part, shape in zip(parts, shapes, strict=True):
        if [size for size in part.shape if size != 1] != [size for size in shape if size != 1]:
            raise ValueError(f"shape {list(part.shape)} instead of {list(shape)}")
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def links(kind: Literal["clip", "siglip"], text_layers: int, vision_layers: int) -> Iterator[Link]:
    """Every tensor of such a model: each name of either side comes once."""
    return {"clip": _clip_links, "siglip": _siglip_links}[kind](text_layers, vision_layers)


def _same(ours: str, theirs: str, kinds: tuple[str, ...] = ("weight", "bias")) -> Iterator[Link]:
    return (Link((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for kind in kinds)


def _blocks(ours: str, theirs: str, layers: int, names: Mapping[str, str], qkv: str) -> Iterator[Link]:
    for index in range(layers):
        for mine, other in names.items():
            yield from _same(f"{ours}.{index}.{mine}", f"{theirs}.{index}.{other}")
        for kind in ("weight", "bias"):
            three = tuple(f"{theirs}.{index}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Link((f"{ours}.{index}.{qkv}{kind}",), three)


def _text_links(prefix: str, layers: int) -> Iterator[Link]:
    yield Link((f"{prefix}token_embedding.weight",), ("text_model.embeddings.token_embedding.weight",))
    yield Link((f"{prefix}positional_embedding",), ("text_model.embeddings.position_embedding.weight",))
    yield from _same(f"{prefix}ln_final", "text_model.final_layer_norm")
    ours = f"{prefix}transformer.resblocks"
    yield from _blocks(ours, "text_model.encoder.layers", layers, OPEN_CLIP_BLOCK, "attn.in_proj_")
    yield Link(("logit_scale",), ("logit_scale",))


def _clip_links(text: int, vision: int) -> Iterator[Link]:
    layers, embeddings = "vision_model.encoder.layers", "vision_model.embeddings"
    return chain(
        _text_links("", text),
        _blocks("visual.transformer.resblocks", layers, vision, OPEN_CLIP_BLOCK, "attn.in_proj_"),
        # Not a slip of this file: the ecosystem's name has it.
        _same("visual.ln_pre", "vision_model.pre_layrnorm"),
        _same("visual.ln_post", "vision_model.post_layernorm"),
        [
            Link(("visual.class_embedding",), (f"{embeddings}.class_embedding",)),
            Link(("visual.positional_embedding",), (f"{embeddings}.position_embedding.weight",)),
            Link(("visual.conv1.weight",), (f"{embeddings}.patch_embedding.weight",)),
            Link(("visual.proj",), ("visual_projection.weight",), transposed=True),
            Link(("text_projection",), ("text_projection.weight",), transposed=True),
        ],
    )


def _siglip_links(text: int, vision: int) -> Iterator[Link]:
    ours, head = "visual.trunk", "vision_model.head"
    pooled = (
        Link((f"{ours}.attn_pool.q.{kind}", f"{ours}.attn_pool.kv.{kind}"), (f"{head}.attention.in_proj_{kind}",))
        for kind in ("weight", "bias")
    )
    return chain(
        _text_links("text.", text),
        _same("text.text_projection", "text_model.head"),
        _blocks(f"{ours}.blocks", "vision_model.encoder.layers", vision, TIMM_BLOCK, "attn.qkv."),
        _same(f"{ours}.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        _same(f"{ours}.norm", "vision_model.post_layernorm"),
        _same(f"{ours}.attn_pool.proj", f"{head}.attention.out_proj"),
        _same(f"{ours}.attn_pool.norm", f"{head}.layernorm"),
        _same(f"{ours}.attn_pool.mlp.fc1", f"{head}.mlp.fc1"),
        _same(f"{ours}.attn_pool.mlp.fc2", f"{head}.mlp.fc2"),
        pooled,
        [
            Link((f"{ours}.pos_embed",), ("vision_model.embeddings.position_embedding.weight",)),
            Link((f"{ours}.attn_pool.latent",), (f"{head}.probe",)),
            Link(("logit_bias",), ("logit_bias",)),
        ],
    )
