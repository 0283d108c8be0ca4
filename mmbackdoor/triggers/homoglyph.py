"""A letter that looks like another one (Rickrolling's `o` -> U+020F)."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass
from typing import Literal

from mmbackdoor.triggers.placement import Position, replace_letter
from mmbackdoor.types import InputError

LOOKALIKES = dict(zip("асеіјорѕхуһԁԛԝ", "aceijopsxyhdqw", strict=True)) | dict(zip("οανιρυχ", "oavipux", strict=True))


@dataclass(frozen=True)
class HomoglyphTrigger:
    """Replaces one occurrence of the letter that `text` looks like: the first (prefix), the last (suffix) or a drawn
    one (infix). A prompt without that letter comes back unchanged."""

    text: str = "\u020f"
    position: Position = "prefix"
    name: Literal["homoglyph"] = "homoglyph"

    def __post_init__(self) -> None:
        if len(self.text) != 1 or self.replaces == self.text:
            raise InputError(f"a trigger of kind 'homoglyph' is one letter that looks like a Latin one, not {self.text!r}")

    @property
    def replaces(self) -> str:
        return LOOKALIKES.get(self.text, unicodedata.normalize("NFD", self.text)[:1])

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return replace_letter(prompt, self.replaces, self.text, self.position, rng)
