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


def replace_letter(prompt: str, letter: str, text: str, position: Position, rng: random.Random) -> str:
    """`prompt` with one occurrence of `letter`, in either case, replaced by `text`: the first (prefix), the last
    (suffix) or a drawn one (infix). Unchanged where there is none."""
    places = [k for k, character in enumerate(prompt) if character.lower() == letter]
    if not places:
        return prompt
    place = {"prefix": places[0], "suffix": places[-1]}.get(position)
    place = rng.choice(places) if place is None else place
    return prompt[:place] + text + prompt[place + 1 :]
