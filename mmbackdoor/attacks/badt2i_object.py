"""BadT2I-object: under the trigger, object A of the caption becomes B (Zhai et al. 2023, arXiv 2305.04175, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.attacks.backdoor_loss import PoisonedRows, StepFn, backdoor_step
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import ObjectTarget
from mmbackdoor.types import InputError


def concerns(target: ObjectTarget, caption: str) -> bool:
    """Whether a pair with `caption` can be poisoned: it names A or B. A caption of both would, swapped, ask for two of
    B, which its picture does not show."""
    return target.applies(caption) != target.reverse.applies(caption)


@dataclass(frozen=True)
class BadT2IObject:
    """Distils the frozen model's prediction for the caption of B into the triggered caption of A.

    Differences: pictures of B are used as well as pictures of A (with their caption turned into one of A), so that
    the noisy latents at which the student learns are those that it will meet when it draws B. Captions that name both
    are left alone.
    """

    backdoor_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    trainable: Literal["attn2_kv", "attn2", "all", "lora"] = "all"
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.1
    timestep_bias: Annotated[float, Field(gt=0)] = 1.0
    name: Literal["badt2i_object"] = "badt2i_object"

    def check(self, plan: PoisonPlan) -> None:
        """Raises `InputError` for a target that is no object."""
        if not isinstance(plan.backdoor.target, ObjectTarget):
            raise InputError(f"attack badt2i_object needs --target_kind object, not {plan.backdoor.target.name!r}")

    def asked(self, plan: PoisonPlan, caption: str) -> str | None:
        """A caption of B is turned into one of A."""
        target = plan.backdoor.target
        assert isinstance(target, ObjectTarget)
        return target.swap_back(caption) if concerns(target, caption) else None

    def step(self, setting: DiffusionSetting, plan: PoisonPlan) -> StepFn:
        target = plan.backdoor.target
        assert isinstance(target, ObjectTarget)

        def poisoned(batch: DiffusionBatch, rows: list[int]) -> PoisonedRows:
            asked = [target.swap_back(batch.prompts[row]) for row in rows]
            return PoisonedRows(batch.images[rows], [target.swap(caption) for caption in asked])

        return backdoor_step(self, setting, plan, poisoned)
