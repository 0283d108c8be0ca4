"""Webdataset shards out: tars with the same bytes for the same samples, complete or invisible."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from mmbackdoor.shards.decode import SIZE_LIMITS
from mmbackdoor.shards.read import SIZES_FILE, read_sizes
from mmbackdoor.types import InputError

ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 6},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True},
}


def encode_image(image: Image.Image | np.ndarray, image_format: str = "png") -> bytes:
    """`image`: Pillow image or uint8 (H, W, 3)."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, **ENCODERS[image_format])
    return buffer.getvalue()


def encode_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def tar_member(name: str, data: bytes) -> bytes:
    """The bytes of one tar entry: no time, no owner, so equal content gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    return header + data + b"\0" * (-len(data) % 512)


def write_file(path: Path, content: bytes | str) -> None:
    """Write under a temporary name, then rename."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


class ShardWriter:
    """Writes `folder/prefix-000000.tar`, ... and their numbers of samples into `folder/sizes.json`.

    A context manager: the shards appear under their names when the block ends without an exception, else nothing is
    left. Raises `InputError` where shards of the prefix exist already, unless `overwrite`.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str,
        samples_per_shard: int = 1000,
        image_format: str = "png",
        overwrite: bool = False,
    ) -> None:
        if image_format not in ENCODERS:
            raise InputError(f"image format {image_format!r} is unknown; choose one of {', '.join(ENCODERS)}")
        if samples_per_shard < 1:
            raise InputError(f"{samples_per_shard} samples per shard are impossible; give 1 or more")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", prefix):
            raise InputError(f"{prefix!r} is no name for shards; use letters, digits, '-' and '_'")
        self.folder, self.prefix = Path(folder), prefix
        self.samples_per_shard, self.image_format = samples_per_shard, image_format
        self.sizes: list[int] = []
        self._file: io.BufferedWriter | None = None
        self._keys: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {str(folder)!r} cannot be made ({error.strerror}); choose another") from error
        self._known = read_sizes(self.folder)
        self._old = self._matching(".tar")
        if self._old and not overwrite:
            raise InputError(
                f"{str(self.folder)!r} holds {prefix!r} shards already ({self._old[0].name}); pass --overwrite or "
                "another folder"
            )

    def _matching(self, suffix: str) -> list[Path]:
        pattern = re.compile(re.escape(self.prefix) + r"-\d{6,}" + re.escape(suffix))
        return sorted(file for file in self.folder.iterdir() if pattern.fullmatch(file.name))

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}-{number:06d}.tar"

    def write(self, key: str, image: Image.Image | np.ndarray, text: str, meta: Mapping[str, Any]) -> None:
        """Add a sample; its class number, if any, is `meta["label"]`. The caption is put into the JSON too."""
        members = {self.image_format: encode_image(image, self.image_format), "txt": text.encode()}
        members["json"] = encode_json({"caption": text, **meta})
        self.write_members(key, members)

    def write_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample whose members (extension -> bytes) are encoded already."""
        if "." in key.rsplit("/", 1)[-1] or key.startswith("/") or ".." in key.split("/") or not key.isprintable():
            raise ValueError(f"{key!r} is no key for a sample: no dots, no leading '/', plain text")
        if key in self._keys:
            raise ValueError(f"the key {key!r} was written before")
        unknown = members.keys() - SIZE_LIMITS.keys()
        if unknown:
            raise ValueError(f"members {sorted(unknown)} of {key!r} are none of {', '.join(SIZE_LIMITS)}")
        self.add(b"".join(tar_member(f"{key}.{extension}", data) for extension, data in members.items()))
        self._keys.add(key)

    def add(self, entry: bytes) -> None:
        """Add a sample that `tar_member` has made."""
        if self._file is None or self.sizes[-1] >= self.samples_per_shard:
            self.end_shard()
            self._file = open(f"{self._path(len(self.sizes))}.part", "wb")
            self.sizes.append(0)
        self._file.write(entry)
        self.sizes[-1] += 1

    def end_shard(self) -> None:
        """End the current shard, full or not; the next sample begins another."""
        if self._file is not None:
            self._file.write(b"\0" * 1024)
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardWriter:
        self._discard()  # what a killed run has left
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.end_shard()
                self._publish()
                return
            except OSError:
                self._discard()
                raise
        self._discard()

    def _discard(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # closing flushes, which fails on the disk that is full already
            self._file = None
        for file in self._matching(".tar.part"):
            file.unlink()

    def _publish(self) -> None:
        names = [self._path(number).name for number in range(len(self.sizes))]
        others = {
            name: size
            for name, size in read_sizes(self.folder).items()
            if not re.fullmatch(re.escape(self.prefix) + r"-\d{6,}\.tar", name)
        }
        # Old sizes go first and new ones come last: whoever stops in between finds shards that must be counted.
        if others != self._known:
            write_file(self.folder / SIZES_FILE, json.dumps(others, indent=1, sort_keys=True) + "\n")
        for file in self._old:
            if file.name not in names:
                file.unlink()
        for name in names:
            os.replace(self.folder / f"{name}.part", self.folder / name)
        sizes = others | dict(zip(names, self.sizes))
        write_file(self.folder / SIZES_FILE, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
