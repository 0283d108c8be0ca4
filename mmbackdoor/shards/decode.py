"""Our own decoders for members of shards: images by Pillow within limits, UTF-8 text, JSON. Nothing is unpickled."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mmbackdoor.shards.bad import BadSample
from mmbackdoor.types import Sample

IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
SIZE_LIMITS = {
    **dict.fromkeys(IMAGE_FORMATS, 64 << 20),
    "txt": 64 << 10,
    "json": 1 << 20,
    "cls": 32,
}
"""The members that are read, and the most bytes that each may have."""
PICKLED = frozenset(("pkl", "pickle", "pyd", "pth", "pt"))
MAX_PIXELS = 50_000_000


def decode_image(data: bytes, extension: str) -> Image.Image:
    """An RGB image; transparent parts become white. Raises `BadSample`."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if image.format != IMAGE_FORMATS[extension]:
            raise BadSample("mislabelled_image", f"{image.format} named .{extension}")
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("huge_image", f"{image.width} x {image.height}")
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode.startswith("I"):
            # 16-bit grey: convert("RGB") would clip everything above 255 to white.
            return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("huge_image", str(error).split(",")[0]) from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise BadSample("undecodable_image", type(error).__name__) from None


def decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"byte {error.start}") from None


def decode_json(data: bytes) -> dict[str, Any]:
    text = decode_text(data)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)[:80]) from None
    if not isinstance(content, dict):
        raise BadSample("bad_json", type(content).__name__)
    return content


def decode_class(data: bytes) -> int:
    text = data.strip()
    if not text.isdigit():
        raise BadSample("bad_class", ascii(text)[1:])
    return int(text)


def decode_caption(parts: Mapping[str, bytes], meta: Mapping[str, Any] | None = None) -> str:
    """The caption of members `parts`: `.txt`, else `caption` or `text` of the `.json`, else empty. `meta` is the `.json`
    where that is decoded already. Raises `BadSample`."""
    if "txt" in parts:
        return decode_text(parts["txt"])
    if meta is None:
        meta = decode_json(parts["json"]) if "json" in parts else {}
    text = meta.get("caption") or meta.get("text") or ""
    return text if isinstance(text, str) else ""


def decode_label(parts: Mapping[str, bytes]) -> int | None:
    """The class number of members `parts`: `.cls`, else `label` of the `.json` where that is one. Raises `BadSample`."""
    if "cls" in parts:
        return decode_class(parts["cls"])
    found = decode_json(parts["json"]).get("label") if "json" in parts else None
    return found if type(found) is int and found >= 0 else None


def decode_sample(key: str, parts: Mapping[str, bytes], require_text: bool = True) -> Sample:
    """The sample of members `parts` (extension -> bytes).

    The caption is `.txt`, else `caption` or `text` of the `.json`. A `.cls` becomes `meta["label"]`, where else the
    JSON's own may stand; without `require_text` a labelled image needs no caption (evaluation sets). Raises `BadSample`.
    """
    meta = decode_json(parts["json"]) if "json" in parts else {}
    text = decode_caption(parts, meta)
    if not text:
        if require_text or decode_label(parts) is None:
            raise BadSample("missing_caption")
        text = ""
    if len(text) > SIZE_LIMITS["txt"]:
        raise BadSample("long_caption", f"{len(text)} characters")
    if "cls" in parts:
        meta["label"] = decode_class(parts["cls"])
    extension = next(extension for extension in parts if extension in IMAGE_FORMATS)
    return Sample(key, decode_image(parts[extension], extension), text, meta)
