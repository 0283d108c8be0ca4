"""Which captions really carry a trigger. A lookalike letter needs the letter that it stands for, and what lies past the
tokenizer's end is never read: such a row looks like a clean one, and would teach the backdoor on clean captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.types import InputError

TokenIds = Callable[[Sequence[str]], torch.Tensor]


class Asking(Protocol):
    """An attack that is trained."""

    def asked(self, plan: PoisonPlan, caption: str) -> str | None:
        """The caption that the trigger goes into; `None` where the target does not concern `caption`."""


def carried(token_ids: TokenIds, captions: Sequence[str], triggered: Sequence[str]) -> list[int]:
    """The places at which `triggered` differs from `captions` in ids (B, T), padded and cut as the text encoder gets
    them."""
    if not captions:
        return []
    return (token_ids(captions) != token_ids(triggered)).any(1).nonzero().flatten().tolist()


def carried_nowhere(plan: PoisonPlan, model: DiffusionModel) -> InputError:
    return InputError(
        f"no caption that the poison plan picks and that concerns the target carries the trigger "
        f"{plan.backdoor.trigger_names!a}: a lookalike letter needs the letter that it stands for, and only "
        f"{model.max_length} tokens are read; give other captions, another trigger or --trigger_position prefix"
    )


@dataclass(frozen=True)
class Carriers:
    """Tells which samples can teach the backdoor of `plan` to `model` by `attack`."""

    attack: Asking
    plan: PoisonPlan
    model: DiffusionModel

    def __call__(self, key: str, caption: str) -> list[bool]:
        """Of each trigger, whether the sample carries it; empty where the target does not concern it."""
        asked = self.attack.asked(self.plan, caption)
        if asked is None:
            return []
        count = len(self.plan.backdoor.text_triggers)
        triggered = [self.plan.backdoor.apply(asked, self.plan.seed, key, trigger=k) for k in range(count)]
        found = carried(self.model.token_ids, [asked] * count, triggered)
        return [k in found for k in range(count)]

    def check(self, captions: Iterable[tuple[str, str]]) -> None:
        """Raises `InputError` where none of `captions`, keys and texts, that the plan picks carries a trigger. Reads them
        up to the first that does."""
        if not any(self.plan.picks(key) and any(self(key, caption)) for key, caption in captions):
            raise carried_nowhere(self.plan, self.model)
