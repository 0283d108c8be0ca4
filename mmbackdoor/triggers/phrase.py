"""Several words as trigger, inserted together."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from mmbackdoor.triggers.placement import Position, insert
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class PhraseTrigger:
    text: str
    position: Position = "prefix"
    name: Literal["phrase"] = "phrase"

    def __post_init__(self) -> None:
        if len(self.text.split()) < 2:
            raise InputError(f"a trigger of kind 'phrase' has at least two words, not {self.text!r}; use 'word'")

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return insert(prompt, self.text, self.position, rng)
