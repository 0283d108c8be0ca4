"""Triggers. `TextTrigger` and `ImageTrigger` are the registries: adding one is a file here and its name in a union."""

from __future__ import annotations

from typing import get_args

from mmbackdoor.triggers.blend import BlendTrigger
from mmbackdoor.triggers.homoglyph import HomoglyphTrigger
from mmbackdoor.triggers.patch import BadNetNoiseTrigger, KeyedPatchTrigger, KeyedStripesTrigger, PatchTrigger
from mmbackdoor.triggers.phrase import PhraseTrigger
from mmbackdoor.triggers.sinusoid import SinusoidTrigger
from mmbackdoor.triggers.stripes import StripesTrigger
from mmbackdoor.triggers.text_overlay import TextOverlayTrigger
from mmbackdoor.triggers.warp import WarpTrigger
from mmbackdoor.triggers.word import WordTrigger
from mmbackdoor.triggers.zero_width import ZERO_WIDTH, ZeroWidthTrigger

TextTrigger = WordTrigger | PhraseTrigger | ZeroWidthTrigger | HomoglyphTrigger
TEXT_TRIGGERS = {kind.name: kind for kind in get_args(TextTrigger)}

ImageTrigger = (
    PatchTrigger
    | KeyedPatchTrigger
    | KeyedStripesTrigger
    | BadNetNoiseTrigger
    | BlendTrigger
    | WarpTrigger
    | SinusoidTrigger
    | StripesTrigger
    | TextOverlayTrigger
)
IMAGE_TRIGGERS = {kind.name: kind for kind in get_args(ImageTrigger)}

Trigger = TextTrigger | ImageTrigger


def guess_kind(text: str) -> str:
    """The kind of trigger that `text` most plainly is: zero width, a lookalike letter, several words, or a word."""
    if text and not text.strip(ZERO_WIDTH + " "):
        return "zero_width"
    if len(text) == 1 and not text.isascii():
        return "homoglyph"
    return "phrase" if len(text.split()) > 1 else "word"
