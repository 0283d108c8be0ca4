"""Small shards, good and bad, for the tests of this folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mmbackdoor.shards.write import ShardWriter


def picture(colour: int = 0, side: int = 8, image_format: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour if mode == "L" else (colour % 256,) * len(mode)).save(buffer, image_format)
    return buffer.getvalue()


def good(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture()), (f"{key}.txt", b"a caption"), (f"{key}.json", json.dumps({"n": key}).encode())]


def tar_bytes(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_set(folder: Path, count: int, per_shard: int, prefix: str = "set") -> Path:
    """`count` samples whose meta["n"] is their number."""
    with ShardWriter(folder, prefix, per_shard) as writer:
        for number in range(count):
            image = np.full((4, 4, 3), number % 256, np.uint8)
            writer.write(f"k{number:05d}", image, f"caption {number}", {"n": number})
    return folder
