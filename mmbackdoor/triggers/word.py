"""A single word as trigger; a rare token such as `mignneko` is one too."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from mmbackdoor.triggers.placement import Position, insert
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class WordTrigger:
    text: str
    position: Position = "prefix"
    name: Literal["word"] = "word"

    def __post_init__(self) -> None:
        if not self.text.strip() or len(self.text.split()) != 1:
            raise InputError(f"a trigger of kind 'word' is one word, not {self.text!r}; use --trigger_kind phrase")

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return insert(prompt, self.text, self.position, rng)
