"""What all image triggers share: their place in the pipeline, the codec after them, single pictures and batches."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mmbackdoor.config_schema import Doc

Place = Literal["source", "input"]
Codec = Literal["none", "png", "jpeg", "webp"]
Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
Fraction = Annotated[float, Field(gt=0, le=1)]


def round_trip(image: Image.Image, codec: Codec, quality: int) -> Image.Image:
    """`image` written as `codec` with `quality` (1 to 100; PNG has none) and read again."""
    if codec == "none":
        return image
    options: dict[str, Any] = {} if codec == "png" else {"quality": quality}
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return Image.open(buffer, formats=(codec,)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class ImageMark(ABC):
    """A trigger of pictures: what is in it follows from the picture, a key and a seed, never from the order of calls.

    `place` says where it belongs: on the picture as stored ("source"), or after resize and crop to the model's size
    ("input"). The marked picture goes once through `codec`, as it would on its way to a data set.
    """

    place: Annotated[Place, Doc("on the picture as stored, or after resize and crop to the model's size")] = "source"
    codec: Annotated[Codec, Doc("what the marked picture is written as and read from, once")] = "none"
    quality: Annotated[int, Field(ge=1, le=100), Doc("of jpeg and webp")] = 75

    def __call__(self, image: Image.Image, key: str, seed: int, draw: int = 0) -> Image.Image:
        """The marked picture: RGB, of the same size. `draw` (an epoch, say) matters only to triggers that are fresh
        in every draw; all others give the same for the same (`key`, `seed`)."""
        return Image.fromarray(self._marked(np.asarray(image.convert("RGB")), key, seed, draw))

    def batch(self, images: np.ndarray, keys: Sequence[str], seed: int, draw: int = 0) -> np.ndarray:
        """The same for uint8 (B, H, W, 3), bit for bit. Raises ValueError for anything else."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(keys):
            raise ValueError(f"{images.dtype} {images.shape} with {len(keys)} keys is no uint8 batch (B, H, W, 3)")
        marked = [self._marked(pixels, key, seed, draw) for pixels, key in zip(images, keys, strict=True)]
        return np.stack(marked) if marked else images.copy()

    @abstractmethod
    def mark(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        """The one thing that a trigger writes down: marked float32 (H, W, 3), from `pixels` in 0..255 of which it may
        change the memory. What leaves 0..255 is clamped."""

    def _marked(self, pixels: np.ndarray, key: str, seed: int, draw: int) -> np.ndarray:
        marked = self.mark(pixels.astype(np.float32), key, seed, draw)
        whole = np.clip(np.rint(marked), 0, 255).astype(np.uint8)
        if self.codec == "none":
            return whole
        return np.asarray(round_trip(Image.fromarray(whole), self.codec, self.quality))
