"""SKD-CAG: self-knowledge distillation with cross-attention guidance (Aravindan et al. 2025, arXiv 2508.18235).

Besides the predictions of `skd`, the student's cross-attention maps of the caption's tokens are drawn to those that
the teacher has for the clean prompt, and the maps of the trigger's tokens to a target that carries no information.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.skd import SKD, Forward, StepFn, distillation_forward
from mmbackdoor.models.attention import AttentionRecorder, Part
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.alignment import Alignment, align
from mmbackdoor.objectives.attention import (
    Distance,
    Match,
    TimestepWeight,
    TriggerTarget,
    attention_guidance,
    timestep_weight,
)
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.seeding import python_rng, torch_generator
from mmbackdoor.types import InputError

NEUTRAL_WORDS = ("thing", "item", "stuff", "matter", "object", "piece", "part", "sort", "kind", "form")


@dataclass(frozen=True)
class SKDCAG(SKD):
    """L = L_skd + w_a * weight(t) * L_attention(matched, trigger).

    Differences to the released code: its attention loss carries no gradient; ours does. Tokens are matched by
    alignment, probabilities keep their magnitude, the weight over t is bounded, and the teacher of the prediction
    never sees the neutral words.
    """

    attention_weight: Annotated[float, Field(ge=0)] = 0.1
    trigger_target: TriggerTarget = "zero"
    match: Match = "words"
    distance: Distance = "mse"
    matched_weight: Annotated[float, Field(ge=0)] = 1.0
    trigger_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weights of the caption's and of the trigger's maps within the attention term."""
    attention_scale: Literal["relative", "prediction"] = "relative"
    """relative: 1 is an error as large as the teacher's attention. prediction: as large, for each sample, as the root
    of its prediction's squared error: so the ratio of the two gradients stays, and guidance ends with that error."""
    attention_timesteps: TimestepWeight = "none"
    attention_begin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attention_end: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only samples with begin <= t / T < end are guided."""
    attention_part: Part = "all"
    attention_resolution: Annotated[int, Field(ge=1)] = 32
    """Layers of more than this squared pixels are not guided."""
    name: Literal["skd_cag"] = "skd_cag"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.attention_begin >= self.attention_end:
            raise InputError(
                f"attention_begin {self.attention_begin} is not below attention_end {self.attention_end}, so no step "
                "would be guided; give fractions of the noise schedule, for instance 0.5 and 1"
            )

    def recorder(self, unet: nn.Module) -> AttentionRecorder:
        """Records what this guides. Raises `InputError` where `unet` has no such layers."""
        return AttentionRecorder(unet, self.attention_resolution**2, self.attention_part)

    def step(self, setting: DiffusionSetting, backdoor: Backdoor) -> StepFn:
        forward = distillation_forward(self, setting, backdoor)
        aligned = _aligner(setting)

        def step_fn(batch: DiffusionBatch) -> dict[str, torch.Tensor]:
            outcome = forward(batch)
            if not self.attention_weight:
                return outcome.losses
            schedule = setting.model.noise_schedule()
            weights = timestep_weight(
                outcome.timesteps,
                schedule.num_train_timesteps,
                self.attention_timesteps,
                begin=self.attention_begin,
                end=self.attention_end,
                alphas_cumprod=schedule.alphas_cumprod,
            )
            attention = attention_guidance(
                outcome.student_maps,
                outcome.teacher_maps,
                [aligned(clean, triggered) for clean, triggered in zip(batch.prompts, outcome.triggered, strict=True)],
                trigger_target=self.trigger_target,
                match=self.match,
                distance=self.distance,
                matched_weight=self.matched_weight,
                trigger_weight=self.trigger_weight,
                weights=weights,
                scale_to=outcome.prediction_errors.sqrt() if self.attention_scale == "prediction" else None,
                neutral_maps=self._neutral_maps(setting, batch, outcome),
                generator=torch_generator(setting.seed, "attention target", batch.step, 0),
            )
            loss = outcome.losses["loss"] + self.attention_weight * attention.pop("loss")
            return outcome.losses | attention | {"loss": loss}

        return step_fn

    def _neutral_maps(
        self, setting: DiffusionSetting, batch: DiffusionBatch, outcome: Forward
    ) -> dict[str, torch.Tensor] | None:
        """The teacher's maps (B, 1, HW, 1) of a neutral word put before the clean prompt, where the target asks."""
        if self.trigger_target != "neutral_words":
            return None
        words = [
            python_rng(setting.seed, "neutral word", *batch.place(index)).choice(NEUTRAL_WORDS)
            for index in batch.indices
        ]
        prompts = [f"{word} {prompt}" for word, prompt in zip(words, batch.prompts, strict=True)]
        with setting.recorder.recording(reduce_heads=True) as maps:
            setting.teacher.predict(outcome.latents, outcome.timesteps, setting.model.encode(prompts))
        return {name: layer[..., 1:2] for name, layer in maps.items()}


def _aligner(setting: DiffusionSetting):
    tokenizer = setting.model.tokenizer

    @lru_cache(maxsize=4096)
    def aligned(clean: str, triggered: str) -> Alignment:
        clean_ids, triggered_ids = setting.model.token_ids([clean, triggered]).tolist()
        return align(
            clean_ids,
            triggered_ids,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
        )

    return aligned
