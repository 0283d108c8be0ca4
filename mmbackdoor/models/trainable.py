"""Which UNet weights a method may change, and a teacher that keeps only those weights' original values."""

from __future__ import annotations

from collections.abc import Mapping
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


def text_projections(model: DiffusionModel) -> dict[str, Tensor]:
    """Name -> weight (D_out, D) of every projection of text in the UNet: K and V of its cross-attention, for closed
    forms. Raises `InputError` for a model that has none, or whose LoRA file cannot hold what they give."""
    if model.origin == "lora":
        raise InputError(
            f"a closed form changes whole weights, which the LoRA of {model.source!r} cannot hold; merge it into its "
            "base model first, or take a method that is trained"
        )
    weights = {
        name: value.detach()
        for name, value in model.unet.named_parameters()
        if name.endswith(".weight") and any(part in name for part in _PARTS["attn2_kv"])
    }
    if not weights:
        raise InputError(f"the UNet of {model.source!r} has no cross-attention (attn2) to text that could be edited")
    return weights


@torch.no_grad()
def replace_weights(model: DiffusionModel, tensors: Mapping[str, Tensor]) -> None:
    """Put new values into UNet weights and declare them changed."""
    for name, value in tensors.items():
        model.unet.get_parameter(name).copy_(value)
    model.trained |= set(tensors)


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
        device = self.model.device
        if any(value.device != device for value in self.originals.values()):
            self.originals = {name: value.to(device) for name, value in self.originals.items()}
        return self.model.predict(self._unet, latents, timesteps, conditioning)

    def _unet(self, *positional: Tensor, **named: object) -> tuple[Tensor, ...]:
        # A U-Net ties no weights; looking for some at every call takes a tenth of a small one's forward.
        return torch.func.functional_call(self.model.unet, self.originals, positional, named, tie_weights=False)
