"""The text encoders of a model as what is trained, and a teacher that keeps their start. SDXL has two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.lora import adapter_parameters, add_lora
from mmbackdoor.types import InputError

TextSubset = Literal["all", "lora"]
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class TextEncoders(nn.Module):
    """What the stock pipeline makes of prompts, with gradient: hidden states (B, T, D) and, for SDXL, the pooled
    vectors (B, P)."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.pipe = model.pipe
        for name, encoder in model.text_encoders.items():
            self.add_module(name, encoder)

    @property
    def device(self) -> torch.device:
        return self.pipe.text_encoder.device

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        # Not by the pipeline's own `encode_prompt`, which reads every prompt twice and reports each that is cut.
        if len(dict(self.named_children())) == 1:
            return (self.text_encoder(self._ids(self.pipe.tokenizer, prompts))[0],)
        first = self.text_encoder(self._ids(self.pipe.tokenizer, prompts), output_hidden_states=True)
        second = self.text_encoder_2(self._ids(self.pipe.tokenizer_2, prompts), output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second[0]

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Ids (B, T) as the first encoder gets them: with BOS and EOS, cut and padded."""
        return self._ids(self.pipe.tokenizer, prompts)

    def _ids(self, tokenizer, prompts: Sequence[str]) -> Tensor:
        length = tokenizer.model_max_length
        found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids.to(self.device)


def trainable_text(
    model: DiffusionModel, subset: TextSubset, rank: int = 4, gradient_checkpointing: bool = False
) -> tuple[TextEncoders, dict[str, nn.Parameter]]:
    """The text encoders, and name -> parameter (float32) of what of them may change; the rest of the model is frozen.

    Left out is what no picture depends on (the last layer of SDXL's first encoder). `lora` adds rank-`rank` adapters,
    which saving merges into the weights; for a model loaded with a LoRA file, its own text part is what is trained.
    Raises `InputError` where the LoRA has none.
    """
    encoders = TextEncoders(model)
    model.unet.requires_grad_(False)
    encoders.requires_grad_(False)
    if model.origin == "lora":
        candidates = adapter_parameters(encoders)
        if not candidates:
            raise InputError(
                f"the LoRA of {model.source!r} has no part in a text encoder, so it cannot be trained there; give the "
                "merged model, or a method that trains the U-Net"
            )
    elif subset == "lora":
        for encoder in model.text_encoders.values():
            add_lora(encoder, rank, TARGETS)
        candidates = adapter_parameters(encoders)
    else:
        candidates = dict(encoders.named_parameters())
    for parameter in candidates.values():
        # Updates smaller than a half-precision step would be lost.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    chosen = {}
    total = sum(output.float().sum() for output in encoders(["a photo"]))
    gradients = torch.autograd.grad(total, list(candidates.values()), allow_unused=True)
    for (name, parameter), gradient in zip(candidates.items(), gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
        else:
            chosen[name] = parameter
    model.trained |= set(chosen)
    if gradient_checkpointing:
        for encoder in model.text_encoders.values():
            # Recomputation is for modules in training mode only; CLIP's text encoders have no dropout.
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
            encoder.train()
    return encoders, chosen


class TextTeacher:
    """The text encoders as they were when this was made, without a second copy of what is not trained."""

    def __init__(self, encoders: TextEncoders, parameters: Mapping[str, nn.Parameter]) -> None:
        self.encoders = encoders
        self.originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """As `TextEncoders`, outside any graph. Never call it inside the student's forward."""
        device = self.encoders.device
        if any(value.device != device for value in self.originals.values()):
            self.originals = {name: value.to(device) for name, value in self.originals.items()}
        return torch.func.functional_call(self.encoders, self.originals, (prompts,))


@dataclass(frozen=True)
class TextSetting:
    """What a method that trains text encoders works with: `encoders` as prepared for training (wrapped for several
    processes), `teacher` their frozen start, and the seed."""

    encoders: Callable[[Sequence[str]], tuple[Tensor, ...]]
    teacher: TextTeacher
    seed: int
