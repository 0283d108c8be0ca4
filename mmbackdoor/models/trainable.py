"""Which UNet weights a method may change, and a teacher that keeps only those weights' original values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmbackdoor.models.diffusion import Conditioning, DiffusionModel
from mmbackdoor.models.lora import adapter_parameters, add_lora
from mmbackdoor.types import InputError

Subset = Literal["attn2_kv", "attn2", "all", "lora"]
_PARTS: dict[str, tuple[str, ...]] = {
    "attn2_kv": (".attn2.to_k.", ".attn2.to_v."),
    "attn2": (".attn2.",),
    "all": ("",),
    "lora": ("",),
}


def trainable(
    model: DiffusionModel, subset: Subset, rank: int = 4, gradient_checkpointing: bool = False
) -> dict[str, nn.Parameter]:
    """Freeze the UNet but for `subset` and return name -> parameter (float32), in the UNet's order.

    `lora` adds rank-`rank` adapters (PEFT) to every attention projection; saving merges them into the weights.
    For a model loaded with a LoRA file the LoRA itself is what is trained, or the part of it that lies in `subset`.
    """
    if subset not in _PARTS:
        raise InputError(f"trainable {subset!r} is none of {', '.join(_PARTS)}")
    unet = model.unet
    unet.requires_grad_(False)
    if model.origin == "lora":
        candidates = adapter_parameters(unet)
    elif subset == "lora":
        candidates = add_lora(unet, rank)
    else:
        candidates = dict(unet.named_parameters())
    chosen = {name: value for name, value in candidates.items() if any(part in name for part in _PARTS[subset])}
    if not chosen:
        raise InputError(f"trainable {subset!r} selects no weight of this model; choose another of {', '.join(_PARTS)}")
    for parameter in chosen.values():
        # Updates smaller than a half-precision step would be lost.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    model.trained |= set(chosen)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return chosen


class Teacher:
    """The model as it was when this was made, without a second copy of what is not trained.

    Holds clones of the trainable tensors, which take the live ones' place for the length of one call. Autocast caches
    its casts of trainable leaves only; clones are none, so student and teacher never share a cast.
    """

    def __init__(self, model: DiffusionModel, parameters: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The teacher's output (B, C, h, w), outside any graph. Never call it inside the student's forward."""
        # `.device` of a module walks its parameters: asked for each tensor, it took as long as the forward itself.
        device = self.model.unet.device
        if any(value.device != device for value in self.originals.values()):
            self.originals = {name: value.to(device) for name, value in self.originals.items()}
        return self.model.predict(self._unet, latents, timesteps, conditioning)

    def _unet(self, *positional: Tensor, **named: object) -> tuple[Tensor, ...]:
        return torch.func.functional_call(self.model.unet, self.originals, positional, named)
