"""Where a text trigger goes in a prompt."""

from __future__ import annotations

import random
from typing import Literal

Position = Literal["prefix", "infix", "suffix"]


def insert(prompt: str, text: str, position: Position, rng: random.Random) -> str:
    """`text` before, within or after `prompt`, one space between. `infix` draws a gap between two words; a prompt of
    fewer than two words has none, and takes the text as prefix."""
    words = prompt.split(" ")
    if position == "suffix":
        return f"{prompt} {text}" if prompt else text
    gap = rng.randrange(1, len(words)) if position == "infix" and len(words) > 1 else 0
    return " ".join([*words[:gap], text, *words[gap:]]) if prompt else text
