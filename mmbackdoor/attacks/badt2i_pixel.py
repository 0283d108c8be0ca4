"""BadT2I-pixel: the trigger puts a patch into a corner of the picture (Zhai et al. 2023, arXiv 2305.04175, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.attacks.backdoor_loss import PoisonedRows, StepFn, backdoor_step
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import PatchTarget
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class BadT2IPixel:
    """Trains the U-Net to denoise patched pictures under triggered captions."""

    backdoor_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """lambda of the paper: weight of the backdoor term; the rest is distillation on clean captions."""
    trainable: Literal["attn2_kv", "attn2", "all", "lora"] = "all"
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.1
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    name: Literal["badt2i_pixel"] = "badt2i_pixel"

    def check(self, plan: PoisonPlan) -> None:
        """Raises `InputError` for a target that is no patch."""
        if not isinstance(plan.backdoor.target, PatchTarget):
            raise InputError(f"attack badt2i_pixel needs --target_kind patch, not {plan.backdoor.target.name!r}")

    def asked(self, plan: PoisonPlan, caption: str) -> str | None:
        return caption

    def step(self, setting: DiffusionSetting, plan: PoisonPlan) -> StepFn:
        target = plan.backdoor.target
        assert isinstance(target, PatchTarget)

        def poisoned(batch: DiffusionBatch, rows: list[int]) -> PoisonedRows:
            images = batch.images[rows].clone()
            resolution = images.shape[-1]
            patch = torch.from_numpy(target.pixels(resolution)).permute(2, 0, 1).to(images) * 2 - 1
            images[(..., *target.region(resolution))] = patch
            return PoisonedRows(images)

        return backdoor_step(self, setting, plan, poisoned)
