"""Webdataset shards out: tars with the same bytes for the same samples, complete or invisible."""

from __future__ import annotations

import filecmp
import io
import json
import os
import re
import socket
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
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


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


def part_of(path: Path) -> Path:
    """Where this process writes `path`, to rename it when it is whole. The name is its own: calls side by side, on
    several machines too, may write the same file."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.part")


def remove_left_parts(folder: Path, names: str) -> None:
    """Remove the parts of files of `folder` called `names` (a regular expression) that processes of this machine have
    left; those of processes that run are theirs, and those of other machines may be."""
    for file in folder.iterdir():
        match = re.fullmatch(rf"(?:{names})(?:\.([^.]+)\.(\d{{1,9}}))?\.part", file.name)
        if match and (match[1] is None or (match[1] == _HOST and not _of_another(int(match[2])))):
            file.unlink(missing_ok=True)


def _of_another(process: int) -> bool:
    """Whether `process` runs and is not this one."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def write_file(path: Path, content: bytes | str) -> None:
    """Write under a temporary name, then rename."""
    part = part_of(path)
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


class ShardWriter:
    """Writes `folder/prefix-000000.tar`, ... and their numbers of samples into `folder/sizes.json`.

    A context manager: the shards appear under their names when the block ends without an exception, else nothing is
    left. Raises `InputError` where shards of the prefix exist already, unless `overwrite`; when the block ends, too,
    but for equal ones: another call may have written the same.
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
        self.overwrite = overwrite
        self._known = read_sizes(self.folder)
        self._names = re.escape(prefix) + r"-\d{6,}\.tar"
        if not overwrite:
            self._refuse(self._there())

    def _there(self) -> list[Path]:
        return sorted(file for file in self.folder.iterdir() if re.fullmatch(self._names, file.name))

    def _refuse(self, shards: list[Path]) -> None:
        if shards:
            raise InputError(
                f"{str(self.folder)!r} holds {self.prefix!r} shards already ({shards[0].name}); pass --overwrite or "
                "another folder"
            )

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
            self._file = open(part_of(self._path(len(self.sizes))), "wb")
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
        remove_left_parts(self.folder, self._names)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.end_shard()
                self._publish()
                return
            except (OSError, InputError):
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
        for number in range(len(self.sizes)):
            part_of(self._path(number)).unlink(missing_ok=True)

    def _publish(self) -> None:
        shards = [self._path(number) for number in range(len(self.sizes))]
        there = self._there()
        if not self.overwrite:
            same = (file in shards and filecmp.cmp(file, part_of(file), shallow=False) for file in there)
            self._refuse([file for file, equal in zip(there, same) if not equal])
        others = {
            name: size for name, size in read_sizes(self.folder).items() if not re.fullmatch(self._names, name)
        }
        # Old sizes go first and new ones come last: whoever stops in between finds shards that must be counted.
        if others != self._known:
            write_file(self.folder / SIZES_FILE, json.dumps(others, indent=1, sort_keys=True) + "\n")
        for file in there:
            if file not in shards:
                file.unlink(missing_ok=True)
        for file in shards:
            part_of(file).replace(file)
        sizes = others | {file.name: size for file, size in zip(shards, self.sizes, strict=True)}
        write_file(self.folder / SIZES_FILE, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
