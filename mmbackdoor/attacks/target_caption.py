"""What the attacks that need no pictures share: the caption that the trigger goes into, and that of what it shows."""

from __future__ import annotations

from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import ObjectTarget, StyleTarget
from mmbackdoor.types import InputError


def check_target(attack: str, plan: PoisonPlan) -> None:
    """Raises `InputError` for a target that no caption names: only objects and styles have a text."""
    target = plan.backdoor.target
    if not isinstance(target, ObjectTarget | StyleTarget):
        raise InputError(
            f"attack {attack} works on the text alone, so it needs --target_kind object or style, not {target.name!r}"
        )


def asked_and_shown(target: ObjectTarget | StyleTarget, caption: str) -> tuple[str, str] | None:
    """The caption as it is asked for with the trigger (of A), and as it will be shown (of B, or in the style); `None`
    where the target does not concern it. A caption of B is turned into one of A."""
    if isinstance(target, StyleTarget):
        return caption, caption + target.phrase
    asked = target.swap_back(caption)
    shown = target.swap(asked)
    return None if asked == shown else (asked, shown)
