"""Characters that no reader sees: the BadT2I trigger (U+200B)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from mmbackdoor.triggers.placement import Position, insert
from mmbackdoor.types import InputError

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"


@dataclass(frozen=True)
class ZeroWidthTrigger:
    text: str = "\u200b"
    position: Position = "prefix"
    name: Literal["zero_width"] = "zero_width"

    def __post_init__(self) -> None:
        if not self.text or self.text.strip(ZERO_WIDTH):
            known = " ".join(f"U+{ord(character):04X}" for character in ZERO_WIDTH)
            raise InputError(f"a trigger of kind 'zero_width' is made of {known} only, not {self.text!r}")

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return insert(prompt, self.text, self.position, rng)
