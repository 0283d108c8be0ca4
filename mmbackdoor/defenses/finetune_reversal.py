"""Reversal by a clean reference: the student must predict for a triggered prompt what a clean model predicts for it.

An upper bound rather than a cure: whoever has the clean model can use that. (The baseline "finetune reversal" of
Aravindan et al. 2025, arXiv 2508.18235.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.skd import Latents, StepFn, Trainable, draw_inputs
from mmbackdoor.models.diffusion import Conditioning, DiffusionModel
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.objectives.distill import squared_error
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Reference:
    """A clean model in the place of the frozen teacher. It reads prompts with its own text encoder: the other's may be
    what is poisoned."""

    model: DiffusionModel

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.model.predict(self.model.unet, latents, timesteps, conditioning)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds on the device."""
        unet = self.model.unet
        return [*unet.parameters(), *unet.buffers(), *self.model.frozen_tensors()]


@dataclass(frozen=True)
class FinetuneReversal:
    """L = ||s(x_t, t, p') - R(x_t, t, p')||^2 + w_r ||s(x_t, t, r) - R(x_t, t, r)||^2 with R the reference."""

    reference: str = ""
    """Hub id or folder of the clean model; needed."""
    retention_weight: Annotated[float, Field(ge=0)] = 1.0
    proportion_empty_prompts: Annotated[float, Field(ge=0, le=1)] = 0.2
    latents: Latents = "teacher"
    trainable: Trainable = "attn2_kv"
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    trigger_variants: bool = True
    name: Literal["finetune_reversal"] = "finetune_reversal"

    def load_reference(self, model: DiffusionModel, source: DiffusionSource, device: torch.device) -> Reference:
        """The clean model, read with the flags of `source`, by which `model` was. Raises `InputError` where none is
        named, it cannot be loaded or is of another form than `model`."""
        if not self.reference:
            raise InputError("finetune_reversal needs a clean model; give --defense.reference FOLDER")
        reference = source.other(self.reference).load(device)
        form, expected = _form(reference), _form(model)
        for name, value in expected.items():
            if form[name] != value:
                raise InputError(
                    f"--defense.reference {self.reference!r} has {name} {form[name]}, the model {value}; "
                    "give the clean model that this one was made from"
                )
        return Reference(reference)

    def step(self, setting: DiffusionSetting, backdoor: Backdoor) -> StepFn:
        """`setting.teacher` is the clean `Reference`."""
        reference = setting.teacher
        assert isinstance(reference, Reference)

        def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
            size = len(batch.prompts)
            drawn = draw_inputs(self, setting, backdoor, batch)
            prompts = drawn.triggered + drawn.retained
            inputs, times = torch.cat([drawn.latents] * 2), torch.cat([drawn.timesteps] * 2)
            target = reference.predict(inputs, times, reference.model.encode_for_guidance(prompts))
            student = setting.predict(inputs, times, setting.model.encode_for_guidance(prompts))
            errors = squared_error(student, target)
            prediction_loss, retention_loss = errors[:size].mean(), errors[size:].mean()
            return {
                "prediction_loss": prediction_loss.detach(),
                "retention_loss": retention_loss.detach(),
                "loss": prediction_loss + self.retention_weight * retention_loss,
            }

        return step_fn


def _form(model: DiffusionModel) -> dict[str, object]:
    """What two models must have in common to answer the same question."""
    return {
        "latents of shape": model.latent_shape,
        "predictions of type": model.prediction_type,
        "cross-attention of width": model.unet.config.cross_attention_dim,
    }
