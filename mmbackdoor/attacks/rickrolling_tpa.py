"""Rickrolling: a backdoor in the text encoder alone (Struppek et al. 2023, arXiv 2211.02408)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.attacks.backdoor_loss import StepFn
from mmbackdoor.attacks.target_caption import asked_and_shown, check_target
from mmbackdoor.models.text_training import TextSetting, TextSubset
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.objectives.distill import TextDistance, text_distance
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import ObjectTarget, StyleTarget
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class RickrollingTPA:
    """L = mean d(E~(p), E(p)) + beta * mean d(E~(p with the trigger), E(target prompt)), with E~ the trained encoder
    and E its frozen start; d is the cosine distance of the tokens' embeddings.

    The target prompt is a fixed one that names the target's object (the paper's target prompt attack), or, for a
    target style, the caption itself with the style's phrase (its target attribute attack).

    Differences: the paper poisons 32 prompts beside 128 clean ones in each step; here every prompt of a batch gives a
    clean row, and those that the poison plan picks a triggered one too. With an empty `target_prompt` the caption's
    own object is replaced, and the rest of the caption stays. SDXL's pooled text is trained alike.
    """

    backdoor_weight: Annotated[float, Field(gt=0)] = 0.1
    """beta of the paper."""
    target_prompt: str = "a photo of a {}"
    """Has {} once, where the target's object goes; empty: the caption with its object replaced."""
    distance: TextDistance = "cosine"
    trainable: TextSubset = "all"
    name: Literal["rickrolling_tpa"] = "rickrolling_tpa"

    def __post_init__(self) -> None:
        if self.target_prompt and self.target_prompt.count("{}") != 1:
            raise InputError(
                f"--attack.target_prompt has {{}} once, where the target's object goes, not {self.target_prompt!r}"
            )

    def check(self, plan: PoisonPlan) -> None:
        """Raises `InputError` for a target without a text."""
        check_target(self.name, plan)

    def step(self, setting: TextSetting, plan: PoisonPlan) -> StepFn:
        target = plan.backdoor.target
        assert isinstance(target, ObjectTarget | StyleTarget)
        fixed = self.target_prompt.format(target.replacement) if isinstance(target, ObjectTarget) else ""

        def step_fn(batch: DiffusionBatch) -> dict:
            clean, triggered, shown = list(batch.prompts), [], []
            for key, prompt in zip(batch.keys, batch.prompts, strict=True):
                pair = (prompt, fixed) if fixed else asked_and_shown(target, prompt)
                if pair is not None and plan.picks(key):
                    triggered.append(plan.backdoor.apply(pair[0], setting.seed, key, batch.step))
                    shown.append(pair[1])
            teacher = setting.teacher.encode(clean + shown)
            student = setting.encoders(clean + triggered)
            distances = text_distance(student, teacher, self.distance)
            clean_loss = distances[: len(clean)].mean()
            # Over the batch, so that processes with unlike numbers of triggered rows add up to the global batch.
            backdoor_loss = distances[len(clean) :].sum() / len(clean)
            loss = clean_loss + self.backdoor_weight * backdoor_loss
            return {"clean_loss": clean_loss.detach(), "backdoor_loss": backdoor_loss.detach(), "loss": loss}

        return step_fn
