"""Rickrolling: a backdoor in the text encoder alone (Struppek et al. 2023, arXiv 2211.02408)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.attacks.backdoor_loss import StepFn
from mmbackdoor.attacks.carried import carried
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
        """Raises `InputError` for a target without a text, and for a target prompt that a style has no use for."""
        check_target(self.name, plan)
        if isinstance(plan.backdoor.target, StyleTarget) and self.target_prompt != RickrollingTPA.target_prompt:
            raise InputError(
                f"--attack.target_prompt {self.target_prompt!r} is for objects; a style is asked for by the caption "
                "itself, so leave it out"
            )

    def pair(self, plan: PoisonPlan, caption: str) -> tuple[str, str] | None:
        """The caption that the trigger goes into, and what it shall be read as; `None` where the target does not
        concern `caption`."""
        target = plan.backdoor.target
        assert isinstance(target, ObjectTarget | StyleTarget)
        if self.target_prompt and isinstance(target, ObjectTarget):
            return caption, self.target_prompt.format(target.replacement)
        return asked_and_shown(target, caption)

    def asked(self, plan: PoisonPlan, caption: str) -> str | None:
        pair = self.pair(plan, caption)
        return None if pair is None else pair[0]

    def step(self, setting: TextSetting, plan: PoisonPlan) -> StepFn:
        def step_fn(batch: DiffusionBatch) -> dict:
            clean, asked, triggered, shown = list(batch.prompts), [], [], []
            for key, prompt in zip(batch.keys, batch.prompts, strict=True):
                pair = self.pair(plan, prompt)
                if pair is not None and plan.picks(key):
                    asked.append(pair[0])
                    triggered.append(plan.backdoor.apply(pair[0], setting.seed, key, batch.step))
                    shown.append(pair[1])
            rows = carried(setting.teacher.encoders.token_ids, asked, triggered)
            triggered, shown = [triggered[k] for k in rows], [shown[k] for k in rows]
            teacher = setting.teacher.encode(clean + shown)
            student = setting.encoders(clean + triggered)
            distances = text_distance(student, teacher, self.distance)
            clean_loss = distances[: len(clean)].mean()
            # Over the batch, so that processes with unlike numbers of triggered rows add up to the global batch.
            backdoor_loss = distances[len(clean) :].sum() / len(clean)
            loss = clean_loss + self.backdoor_weight * backdoor_loss
            return {"clean_loss": clean_loss.detach(), "backdoor_loss": backdoor_loss.detach(), "loss": loss}

        return step_fn
