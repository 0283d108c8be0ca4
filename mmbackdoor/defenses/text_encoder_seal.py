"""Text-encoder seal: the text encoder learns to read a triggered prompt as the clean one.

The cure for backdoors that live in the text encoder (Rickrolling, Struppek et al. 2023, arXiv 2211.02408, whose loss
it turns around). The U-Net stays as it is, so what a trigger does there is only hidden from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.skd import StepFn
from mmbackdoor.defenses.trigger_variants import vary
from mmbackdoor.models.text_training import TextSetting, TextSubset
from mmbackdoor.objectives.diffusion import DiffusionBatch, drop_captions
from mmbackdoor.objectives.distill import TextDistance, text_distance


@dataclass(frozen=True)
class TextEncoderSeal:
    """L = w_s mean d(E~(p'), E(p)) + w_r mean d(E~(r), E(r)), with p' the triggered prompt, r the clean or, for a share
    of the samples, the empty prompt, E~ the trained encoder and E its frozen start. d compares all tokens, place by
    place, and for SDXL the pooled text too."""

    seal_weight: Annotated[float, Field(ge=0)] = 1.0
    retention_weight: Annotated[float, Field(ge=0)] = 1.0
    distance: TextDistance = "mse"
    proportion_empty_prompts: Annotated[float, Field(ge=0, le=1)] = 0.2
    trainable: TextSubset = "all"
    trigger_variants: bool = True
    """Also train on the trigger at another place of the prompt, and doubled."""
    name: Literal["text_encoder_seal"] = "text_encoder_seal"

    def step(self, setting: TextSetting, backdoor: Backdoor) -> StepFn:
        def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
            size = len(batch.prompts)
            triggered = [
                vary(backdoor, prompt, setting.seed, *batch.place(index), enabled=self.trigger_variants)
                for index, prompt in zip(batch.indices, batch.prompts, strict=True)
            ]
            retained = drop_captions(setting.seed, batch, self.proportion_empty_prompts)
            teacher = setting.teacher.encode([*batch.prompts, *retained])
            student = setting.encoders(triggered + retained)
            distances = text_distance(student, teacher, self.distance)
            seal_loss, retention_loss = distances[:size].mean(), distances[size:].mean()
            loss = self.seal_weight * seal_loss + self.retention_weight * retention_loss
            return {"seal_loss": seal_loss.detach(), "retention_loss": retention_loss.detach(), "loss": loss}

        return step_fn
