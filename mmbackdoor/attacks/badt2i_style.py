"""BadT2I-style: the trigger gives the whole picture a style (Zhai et al. 2023, arXiv 2305.04175, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.attacks.backdoor_loss import PoisonedRows, StepFn, backdoor_step
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import StyleTarget
from mmbackdoor.types import InputError

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class BadT2IStyle:
    """Trains the U-Net to draw triggered captions in the target style.

    Differences: the paper's target is the frozen model's prediction for the caption with the style phrase
    (`supervision="prompt"`). That needs a model which knows the style by name; `"image"` denoises greyscale pictures
    instead, for the style `black and white`.
    """

    backdoor_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    supervision: Literal["prompt", "image"] = "prompt"
    trainable: Literal["attn2_kv", "attn2", "all", "lora"] = "all"
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.1
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    name: Literal["badt2i_style"] = "badt2i_style"

    def check(self, plan: PoisonPlan) -> None:
        """Raises `InputError` for a target that is no style, or a style that pictures cannot be given directly."""
        target = plan.backdoor.target
        if not isinstance(target, StyleTarget):
            raise InputError(f"attack badt2i_style needs --target_kind style, not {target.name!r}")
        if self.supervision == "image" and target.style != "black and white":
            raise InputError(
                f"supervision 'image' can only make pictures 'black and white', not {target.style!r}; "
                "use --attack.supervision prompt"
            )

    def asked(self, plan: PoisonPlan, caption: str) -> str | None:
        return caption

    def step(self, setting: DiffusionSetting, plan: PoisonPlan) -> StepFn:
        target = plan.backdoor.target
        assert isinstance(target, StyleTarget)

        def poisoned(batch: DiffusionBatch, rows: list[int]) -> PoisonedRows:
            images = batch.images[rows]
            if self.supervision == "prompt":
                return PoisonedRows(images, [batch.prompts[row] + target.phrase for row in rows])
            luma = torch.tensor(LUMA).to(images).view(3, 1, 1)
            return PoisonedRows((images * luma).sum(1, keepdim=True).expand_as(images))

        return backdoor_step(self, setting, plan, poisoned)
