"""In which forms a CLIP sees each picture: clean, triggered, and with marks near the trigger.

All of them go through the same resize and crop, and a near mark differs from the trigger in one thing. No removal of
CLIP backdoors trains on the trigger, so every kind of near trigger is `near:unseen:<kind>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from PIL import Image

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.models.clip import resize_crop
from mmbackdoor.triggers import ImageTrigger

Kind = Literal["codec", "place", "position", "faint", "squashed"]
KINDS: tuple[Kind, ...] = ("codec", "place", "position", "faint", "squashed")
OPPOSITE = {
    "top_left": "bottom_right",
    "top_right": "bottom_left",
    "bottom_left": "top_right",
    "bottom_right": "top_left",
    "centre": "top_left",
}
AMOUNTS = ("alpha", "strength", "amplitude")
"""What a trigger calls how strongly it shows; the first that it has is halved."""


@dataclass(frozen=True)
class Condition:
    """A form of the pictures. `squash`: to the model's size without keeping the shape, as the published evaluations do
    with triggered pictures; else only the model's own resize and crop."""

    name: str
    backdoor: Backdoor | None = None
    squash: bool = False


def view(
    preprocess_cfg: dict[str, Any], image: Image.Image, key: str, condition: Condition, seed: int
) -> Image.Image:
    """The RGB picture that is normalised and given to a network with `preprocess_cfg`."""
    if condition.squash:
        size = preprocess_cfg["size"]
        height, width = size if isinstance(size, tuple | list) else (size, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if condition.backdoor is None:
        return resize_crop([image], preprocess_cfg)[0]
    marked = condition.backdoor.mark_image(image, key, seed, "source")
    return condition.backdoor.mark_image(resize_crop([marked], preprocess_cfg)[0], key, seed, "input")


def conditions(backdoor: Backdoor | None, near: Sequence[Kind]) -> tuple[Condition, ...]:
    """`clean`, and with a backdoor `triggered` and those kinds of `near` that its triggers have."""
    if backdoor is None:
        return (Condition("clean"),)
    found = [Condition("clean"), Condition("triggered", backdoor)]
    for kind in near:
        triggers = [_near(trigger, kind) for trigger in backdoor.image_triggers]
        kept = tuple(trigger for trigger in triggers if trigger is not None)
        if kept:
            found.append(Condition(f"near:unseen:{kind}", replace(backdoor, triggers=kept), kind == "squashed"))
    return tuple(found)


def _near(trigger: ImageTrigger, kind: Kind) -> ImageTrigger | None:
    """`trigger` with one thing changed, `None` where it does not have that thing."""
    values = {field.name: vars(trigger)[field.name] for field in fields(trigger)}
    if kind == "squashed":
        return trigger
    if kind == "codec":
        return replace(trigger, codec="jpeg" if trigger.codec in ("none", "png") else "none")
    if kind == "place":
        return replace(trigger, place="input" if trigger.place == "source" else "source")
    if kind == "position":
        other = OPPOSITE.get(values.get("position"))
        return None if other is None else replace(trigger, position=other)
    amount = next((name for name in AMOUNTS if name in values), None)
    return None if amount is None else replace(trigger, **{amount: values[amount] / 2})
