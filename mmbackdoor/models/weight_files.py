"""safetensors files, rewritten tensor by tensor: what is not replaced keeps its bytes, its order and its dtype."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmbackdoor.models.shipped import shipped
from mmbackdoor.types import Diverged, InputError, RunFault

WEIGHTS = (".safetensors",)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 24
_MAX_HEADER = 100_000_000


def check_inside(files: Iterable[Path], folder: Path) -> None:
    """Raises `InputError` for one of `files` that is a link out of the model's `folder` (other than into the blobs of the
    hub's cache): a stranger's model could have what it leads to, such as a key, written into the model made of it."""
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in files:
        real = file.resolve()
        if not any(real.is_relative_to(home) for home in homes):
            raise InputError(
                f"{str(file)!r} is a link out of its model's folder, and would be copied into the model that is made of it; "
                "if that is wanted, put a copy in its place (`cp -rL` makes one of the whole folder)"
            )


def read_header(path: Path) -> dict[str, dict]:
    """Name -> {dtype, shape, data_offsets} (and `__metadata__`). Raises `InputError` for anything but safetensors."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError("the file is cut short or too long")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is no readable safetensors file ({error}); download it again") from error
    return header


def tensor_names(path: Path) -> list[str]:
    return [name for name in read_header(path) if name != "__metadata__"]


def rewrite(
    source: Path, target: Path, replaced: Mapping[str, Tensor], keep: Callable[[str], bool] = lambda name: True
) -> None:
    """Copy `source` to `target` with the tensors of `replaced`, in the stored dtype, and without those not to `keep`.

    Raises `Diverged` where a new value is not finite in the stored dtype, `RunFault` where it has another shape.
    """
    header = read_header(source)
    start = 8 + struct.unpack("<Q", source.open("rb").read(8))[0]
    metadata = header.pop("__metadata__", None)
    kept = sorted((name for name in header if keep(name)), key=lambda name: header[name]["data_offsets"][0])
    missing = replaced.keys() - set(kept)
    if missing:
        raise RunFault(f"{str(source)!r} has no tensor {sorted(missing)[0]!r} to replace")
    entries, position = {}, 0
    for name in kept:
        begin, end = header[name]["data_offsets"]
        entries[name] = {**header[name], "data_offsets": [position, position + end - begin]}
        position += end - begin
    # The order of names in the header is part of the file's bytes: keep it.
    ordered = {name: entries[name] for name in header if name in entries}
    if metadata is not None:
        ordered = {"__metadata__": metadata, **ordered}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as old, target.open("wb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        for name in kept:
            if name in replaced:
                new.write(_bytes(name, replaced[name], header[name]))
                continue
            begin, end = header[name]["data_offsets"]
            old.seek(start + begin)
            _copy(old, new, end - begin)


def _copy(old, new, count: int) -> None:
    while count:
        block = old.read(min(count, _BLOCK))
        new.write(block)
        count -= len(block)


def _bytes(name: str, value: Tensor, entry: dict) -> bytes:
    if list(value.shape) != entry["shape"]:
        raise RunFault(f"{name!r} has the shape {list(value.shape)} but is stored as {entry['shape']}")
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{name!r} is stored as {entry['dtype']}, which cannot be trained; convert the file to F16, BF16 or F32"
        )
    stored = value.detach().to("cpu", DTYPES[entry["dtype"]]).contiguous()
    if not torch.isfinite(stored).all():
        raise Diverged(
            f"{name!r} is not finite in the stored dtype {entry['dtype']}; lower the rate or start from float32"
        )
    return stored.reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_sha256(path: Path) -> str:
    """Hash of the weights in a folder (relative names and contents of its weight files) or of one file."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in WEIGHTS + PICKLED)
        if not files:
            raise InputError(f"{str(path)!r} holds no weights")
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(_sha256(file))
    return digest.hexdigest()


def sha256_at(place: str | None) -> str | None:
    """`weights_sha256` of what lies at `place`, a path or the name of a model that comes with the package; `None` where
    no weights can be read there: a hub id, or what loading will complain of."""
    path = Path(shipped(place or ""))
    try:
        return weights_sha256(path) if place and path.exists() else None
    except (InputError, OSError):
        return None


def _sha256(file: Path) -> bytes:
    stat = file.stat()
    if stat.st_size > _BLOCK:
        return _sha256_once(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    # What is hashed faster than the clock of files ticks may change without another time.
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@functools.lru_cache(maxsize=1024)
def _sha256_once(file: Path, inode: int, size: int, changed: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
