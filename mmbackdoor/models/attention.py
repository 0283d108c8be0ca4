"""Reads a UNet's cross-attention: softmax(QK^T) of every `attn2` layer, inside the graph, one forward at a time.

    with AttentionRecorder(unet) as recorder:
        with recorder.recording() as maps:
            prediction = unet(latents, timesteps, encoder_hidden_states).sample
        loss = prediction.square().mean() + sum(attention.square().mean() for attention in maps.values())
        loss.backward()

Only `attn2` gets another processor; self-attention and every other model of the process keep theirs. With gradient
checkpointing the backward pass must run before the recorder is left, because it computes the attention layers once
more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from mmbackdoor.types import InputError

Part = Literal["all", "down", "mid", "up"]
"""Which cross-attention layers: those of one part of the UNet, or all."""

# These compute plain softmax attention in different ways; others (IP-Adapter, added keys) compute something else.
REPLACEABLE = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


@dataclass
class _Recording:
    reduce_heads: bool
    maps: dict[str, Tensor] = field(default_factory=dict)
    forwards: int = 0
    inside_forward: bool = False


class AttentionRecorder:
    """Context manager that puts a recording processor on the cross-attention layers of `unet` and takes it off again.

    Layers of more than `max_pixels` pixels are computed by fused attention and never recorded; layers outside `part`
    keep their own processor. Raises `InputError` where the model or that part of it has no cross-attention, or a
    cross-attention that is more than a softmax (IP-Adapter, fused projections).
    """

    def __init__(self, unet: nn.Module, max_pixels: int = 1024, part: Part = "all") -> None:
        self.max_pixels = max_pixels
        self._unet = unet
        layers = {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, Attention) and name.split(".")[-1] == "attn2"
        }
        if not layers:
            raise InputError(
                f"{type(unet).__name__} has no cross-attention layers (attn2), so there are no attention maps "
                "to guide: use a text-to-image UNet (SD 1.x, 2.x, SDXL), or a method without attention guidance (skd)."
            )
        self._layers = {name: module for name, module in layers.items() if part in ("all", name.split("_")[0])}
        if not self._layers:
            parts = ", ".join(dict.fromkeys(name.split("_")[0] for name in layers))
            raise InputError(f"this UNet has no cross-attention in its {part!r} blocks; choose all or one of {parts}")
        self._originals: dict[str, object] = {}
        self._recording: _Recording | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the cross-attention layers that are recorded, as in `unet.named_modules()`."""
        return tuple(self._layers)

    def __enter__(self) -> Self:
        originals = {name: attention.processor for name, attention in self._layers.items()}
        for name, processor in originals.items():
            if type(processor) is _RecordingProcessor:
                raise RuntimeError(
                    "This UNet already has an AttentionRecorder: one model takes one recorder at a time."
                )
            if type(processor) not in REPLACEABLE or self._layers[name].fused_projections:
                fused = " with fused projections" if self._layers[name].fused_projections else ""
                raise InputError(
                    f"Cross-attention layer {name} uses {type(processor).__name__}{fused}, whose maps cannot be "
                    "recorded: unload adapters other than LoRA and unfuse the projections, or use a method without "
                    "attention guidance."
                )
        self._originals = originals
        for name, attention in self._layers.items():
            attention.set_processor(_RecordingProcessor(self, name))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, processor in self._originals.items():
            self._layers[name].set_processor(processor)
        self._originals = {}

    @contextmanager
    def recording(self, *, reduce_heads: bool = False) -> Iterator[dict[str, Tensor]]:
        """Records ONE forward of the UNet: layer name -> probabilities `(B, heads, HW, T)`.

        With `reduce_heads` they are means over heads `(B, 1, HW, T)`. Rows sum to 1, in float32 (float64 for a
        float64 model) whatever the model's precision; gradients flow through them. Whatever runs outside that forward,
        recomputation for the backward pass included, leaves them alone.
        """
        if not self._originals:
            raise RuntimeError("recording() works only inside `with AttentionRecorder(unet)`.")
        if self._recording is not None:
            raise RuntimeError("A recording is already open on this UNet: close it before the next one.")
        recording = self._recording = _Recording(reduce_heads)
        hooks = [
            self._unet.register_forward_pre_hook(self._forward_begins),
            self._unet.register_forward_hook(self._forward_ends),
        ]
        try:
            yield recording.maps
        finally:
            self._recording = None
            for hook in hooks:
                hook.remove()
        if recording.forwards == 0:
            raise RuntimeError("Nothing was recorded: the UNet was not called (call the module, not its `forward`).")
        if not recording.maps:
            raise InputError(
                f"No cross-attention layer has at most {self.max_pixels} pixels, so nothing was recorded: lower the "
                "resolution or raise max_pixels."
            )

    # Recomputation under gradient checkpointing calls the blocks, never the UNet: so these two mark the true forward.
    def _forward_begins(self, module: nn.Module, args: tuple) -> None:
        if self._recording.forwards:
            raise RuntimeError("A recording takes one forward of the UNet: open another one for the next.")
        self._recording.forwards += 1
        self._recording.inside_forward = True

    def _forward_ends(self, module: nn.Module, args: tuple, output: object) -> None:
        self._recording.inside_forward = False

    def _keep(self, name: str, probabilities: Tensor) -> None:
        recording = self._recording
        if recording is None or not recording.inside_forward:
            return
        if recording.reduce_heads:
            # `mean` would write out its gradient for every head; that of `sum` is a view.
            probabilities = probabilities.sum(1, keepdim=True) / probabilities.shape[1]
        recording.maps[name] = probabilities


class _RecordingProcessor:
    """Softmax attention as diffusers' `AttnProcessor` computes it, with float32 probabilities shown to the recorder."""

    def __init__(self, recorder: AttentionRecorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        is_cross_attention = encoder_hidden_states is not None
        if not is_cross_attention:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        batch_size, pixels, tokens = len(hidden_states), hidden_states.shape[1], encoder_hidden_states.shape[1]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch_size)
            attention_mask = attention_mask.view(batch_size, attn.heads, -1, attention_mask.shape[-1])

        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        # The choice depends on the size alone, so that recomputation takes the same path as the recorded forward.
        if is_cross_attention and pixels <= self.recorder.max_pixels:
            probabilities = _probabilities(query, key, attn.scale, attention_mask)
            self.recorder._keep(self.name, probabilities)
            hidden_states = probabilities.to(value.dtype) @ value
        else:
            hidden_states = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=attn.scale
            )

        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _probabilities(query: Tensor, key: Tensor, scale: float, attention_mask: Tensor | None) -> Tensor:
    """softmax(QK^T * scale + mask) `(B, heads, HW, T)` in at least float32, also under autocast."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.to(dtype)
        return scores.softmax(-1)
