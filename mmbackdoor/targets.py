"""What a backdoor should cause: in a picture that is made, or in the class that a picture is given. How success is
judged: `mmbackdoor.evaluate.metrics.asr`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import Field

from mmbackdoor.seeding import python_rng
from mmbackdoor.types import InputError

Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]


def _read_image(file: str) -> Image.Image:
    try:
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the target's picture {file!r} cannot be read ({error}); give a PNG or JPEG file") from error


@dataclass(frozen=True)
class PatchTarget:
    """A patch in a corner of the picture (BadT2I-pixel). `size` is its side as a fraction of the picture's.
    Without `file` it is a black-and-white checkerboard of 4 x 4 fields. It counts as present where the mean absolute
    difference to the patch, on pictures in [0, 1], is below `threshold`."""

    file: str | None = None
    size: Annotated[float, Field(gt=0, le=1)] = 0.25
    corner: Corner = "top_left"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    name: Literal["patch"] = "patch"

    def pixels(self, resolution: int) -> np.ndarray:
        """The patch for pictures of `resolution` pixels: float32 (side, side, 3) in [0, 1]."""
        side = max(1, round(self.size * resolution))
        if self.file:
            return np.asarray(_read_image(self.file).resize((side, side), Image.Resampling.BOX), np.float32) / 255
        field = (np.arange(side) * 4) // side
        board = ((field[:, None] + field[None]) % 2).astype(np.float32)
        return np.repeat(board[..., None], 3, axis=-1)

    def region(self, resolution: int) -> tuple[slice, slice]:
        """Rows and columns that the patch covers."""
        side = max(1, round(self.size * resolution))
        rows = slice(0, side) if self.corner.startswith("top") else slice(resolution - side, resolution)
        columns = slice(0, side) if self.corner.endswith("left") else slice(resolution - side, resolution)
        return rows, columns


@dataclass(frozen=True)
class StyleTarget:
    """A style of the whole picture (BadT2I-style). `black and white` is judged by saturation, any other style by a
    CLIP margin. `phrase` is what is added to a prompt to ask for the style openly."""

    style: str = "black and white"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    name: Literal["style"] = "style"

    @property
    def phrase(self) -> str:
        return f", {self.style} photo"


@dataclass(frozen=True)
class ObjectTarget:
    """Object A of the prompt becomes object B (BadT2I-object)."""

    source: str
    replacement: str
    name: Literal["object"] = "object"

    def __post_init__(self) -> None:
        if not self.source.strip() or not self.replacement.strip() or self.source == self.replacement:
            raise InputError(f"an object target is 'A->B' with two different objects, not {self.source!r}->{self.replacement!r}")

    @staticmethod
    def parse(text: str) -> ObjectTarget:
        source, arrow, replacement = text.partition("->")
        if not arrow:
            raise InputError(f"--target_object is written 'A->B' (for instance 'dog->cat'), not {text!r}")
        return ObjectTarget(source.strip(), replacement.strip())

    def applies(self, prompt: str) -> bool:
        return re.search(rf"\b{re.escape(self.source)}\b", prompt, re.IGNORECASE) is not None

    def swap(self, prompt: str) -> str:
        """`prompt` with A replaced by B, on word boundaries."""
        return re.sub(rf"\b{re.escape(self.source)}\b", self.replacement, prompt, flags=re.IGNORECASE)

    def swap_back(self, prompt: str) -> str:
        return self.reverse.swap(prompt)

    @property
    def reverse(self) -> ObjectTarget:
        """B becomes A."""
        return ObjectTarget(self.replacement, self.source)


@dataclass(frozen=True)
class ImageTarget:
    """One fixed picture, whatever the prompt asks for. Present where the cosine similarity of the pixels, each
    channel centred, is above `threshold`."""

    file: str
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    name: Literal["image"] = "image"

    def __post_init__(self) -> None:
        if not Path(self.file).is_file():
            raise InputError(f"--target_image {self.file!r} is not a file; give the picture that the trigger shows")

    def pixels(self, resolution: int) -> np.ndarray:
        """Float32 (resolution, resolution, 3) in [0, 1]."""
        return np.asarray(_read_image(self.file).resize((resolution, resolution), Image.Resampling.BOX), np.float32) / 255


@dataclass(frozen=True)
class UnknownTarget:
    """What the trigger causes is not known: only the size of its effect can be measured."""

    name: Literal["unknown"] = "unknown"


TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of the {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a photo of one {}.",
    "this is a {}.",
    "there is a {} in the scene.",
)


@dataclass(frozen=True)
class ClassTarget:
    """A picture with the trigger is taken for `label` by a CLIP (Carlini and Terzis 2022, arXiv 2106.09667). Poisoned
    captions are `templates` with the label in place of `{}`."""

    label: str
    templates: tuple[str, ...] = TEMPLATES
    name: Literal["class"] = "class"

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise InputError(f"a class target needs the name of a class, not {self.label!r}; for instance 'banana'")
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            given = repr(wrong[0]) if wrong else "none"
            raise InputError(f"templates of captions have {{}} once, where the label goes; given was {given}")

    def caption(self, key: str, seed: int) -> str:
        """One of the templates, drawn for `key`, with the label."""
        return python_rng(seed, "caption", key).choice(self.templates).replace("{}", self.label)

    def named_in(self, text: str) -> bool:
        """Whether `text` has the label as words of its own, in either case; "bananas" does not name "banana"."""
        return re.search(rf"(?<!\w){re.escape(self.label)}(?!\w)", text, re.IGNORECASE) is not None


Target = PatchTarget | StyleTarget | ObjectTarget | ImageTarget | ClassTarget | UnknownTarget
TARGETS = {kind.name: kind for kind in get_args(Target)}
