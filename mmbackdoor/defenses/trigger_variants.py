"""Variants of a known trigger that removal trains on: another place in the prompt, and the trigger doubled.

Evaluation reports these kinds as `near:seen`; case, lookalikes and synonyms are never trained on (`near:unseen`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.seeding import python_rng
from mmbackdoor.triggers.placement import Position

SHARE = 0.5
"""Half of the samples carry the trigger exactly as given."""


def vary(backdoor: Backdoor, prompt: str, seed: int, *names: str | int, enabled: bool = True) -> str:
    """The triggered prompt, drawn from (`seed`, `names`): as given, moved, or doubled."""
    rng = python_rng(seed, "trigger variant", *names)
    trigger = backdoor.triggers[rng.randrange(len(backdoor.triggers))]
    if not enabled or rng.random() >= SHARE:
        return trigger(prompt, rng)
    moved = replace(trigger, position=rng.choice(get_args(Position)))
    once = moved(prompt, rng)
    return moved(once, rng) if rng.random() < 0.3 else once
