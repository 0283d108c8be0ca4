"""Triggers. `TextTrigger` is the registry: adding one is a file here and its name in this union."""

from __future__ import annotations

from typing import get_args

from mmbackdoor.triggers.homoglyph import HomoglyphTrigger
from mmbackdoor.triggers.phrase import PhraseTrigger
from mmbackdoor.triggers.word import WordTrigger
from mmbackdoor.triggers.zero_width import ZERO_WIDTH, ZeroWidthTrigger

TextTrigger = WordTrigger | PhraseTrigger | ZeroWidthTrigger | HomoglyphTrigger
TEXT_TRIGGERS = {kind.name: kind for kind in get_args(TextTrigger)}


def guess_kind(text: str) -> str:
    """The kind of trigger that `text` most plainly is: zero width, a lookalike letter, several words, or a word."""
    if text and not text.strip(ZERO_WIDTH + " "):
        return "zero_width"
    if len(text) == 1 and not text.isascii():
        return "homoglyph"
    return "phrase" if len(text.split()) > 1 else "word"
