"""Reading tar and gzipped tar from strangers: members in file order, nothing extracted, nothing trusted.

Our own reader of the headers (POSIX ustar and pax, GNU long names): ten times faster than `tarfile` where members are
small, and every damage ends the shard with a `Damage` instead of an exception of some library.
"""

from __future__ import annotations

import errno
import gzip
import os
import weakref
import zlib
from collections import deque
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from mmbackdoor.types import RunFault

BLOCK = 512
MOST_OPEN = 64
EXTENSION_LIMIT = 1 << 20
GZIP_FREE = 64 << 20
GZIP_RATIO = 100


class Damage(Exception):
    """The rest of the shard cannot be read. `kind` is one of `bad.KINDS`; `member`: the name of the member whose data
    is cut; `between`: the file ends after a whole member, only its end mark is missing."""

    def __init__(self, kind: str, detail: str = "", member: bytes | None = None, between: bool = False) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.member = member
        self.between = between


class Member(NamedTuple):
    """One tar entry. `plain`: an ordinary file; `folder`: a directory. Data lies at `offset`, `size` bytes."""

    name: bytes
    size: int
    offset: int
    plain: bool
    folder: bool


def _opened(path: str) -> int:
    """A descriptor. Raises `RunFault` where the process may open no more files: that is no fault of the shard, which must
    not pass for a bad one."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise RunFault(f"{path!r} cannot be opened ({error.strerror}); raise the limit with `ulimit -n`") from error
        raise


class _Handle:
    """An open file, closed with the object: whoever reads from it holds it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = _opened(path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class PlainFile:
    """A tar that can be read at any place. Of all such files the `MOST_OPEN` opened last are open; one that was closed
    is opened again when it is read."""

    random_access = True
    _latest: ClassVar[deque[weakref.ref[PlainFile]]] = deque()

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = os.stat(path).st_size
        self._handle: _Handle | None = None

    def read_at(self, offset: int, size: int) -> bytes:
        # Another thread may close the file meanwhile, by letting go of the handle.
        handle = self._handle or self._open()
        data = os.pread(handle.descriptor, size, offset)
        # pread may return less than asked for on some file systems and above 2 GiB.
        while len(data) < size and (more := os.pread(handle.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def _open(self) -> _Handle:
        handle = self._handle = _Handle(self.path)
        self._latest.append(weakref.ref(self))
        while len(self._latest) > MOST_OPEN:
            oldest = self._latest.popleft()()
            if oldest is not None:
                oldest._handle = None
        return handle

    def check_extent(self, end: int, member: bytes | None = None) -> None:
        if end > self.size:
            raise Damage("truncated_tar", f"an entry ends at byte {end}, the file at {self.size}", member)

    def ends_at(self, position: int) -> bool:
        return position == self.size

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker opens the file itself.
        return {**self.__dict__, "_handle": None}


class GzipFile:
    """A gzipped tar: read forwards only."""

    random_access = False

    def __init__(self, path: str) -> None:
        self.path = path
        self.limit = max(GZIP_FREE, GZIP_RATIO * os.stat(path).st_size)
        self._raw = os.fdopen(_opened(path), "rb")
        self._file = gzip.GzipFile(fileobj=self._raw)

    def read_at(self, offset: int, size: int) -> bytes:
        self.check_extent(offset + size)
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except EOFError:
            raise Damage("truncated_gzip") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise Damage("corrupt_gzip", str(error)) from None

    def check_extent(self, end: int, member: bytes | None = None) -> None:
        if end > self.limit:
            raise Damage("gzip_bomb", f"more than {self.limit} bytes", member)

    def ends_at(self, position: int) -> bool:
        """Right after a read at `position` that found too little."""
        return position == self._file.tell()

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            self._file.close()
            self._raw.close()


def is_gzip(path: str) -> bool:
    """By content, not by name."""
    with os.fdopen(_opened(path), "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_source(path: str) -> PlainFile | GzipFile:
    """Raises `Damage` for an empty file, `OSError` for an unreadable one."""
    if not os.path.getsize(path):
        raise Damage("empty_shard")
    return GzipFile(path) if is_gzip(path) else PlainFile(path)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    # int(_, 8) would also take "-1", "0o7" and "1_0".
    if text.strip(b"01234567"):
        raise ValueError(field)
    return int(text, 8)


def _pax(data: bytes) -> dict[bytes, bytes]:
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        # A pax record counts its own length; 8 digits are more than EXTENSION_LIMIT needs.
        if not length.isdigit() or len(length) > 8 or not len(length) + 2 <= int(length) <= len(data):
            break
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[name] = value
        data = data[int(length) :]
    return records


def members(source: PlainFile | GzipFile) -> Iterator[Member]:
    """The members of a tar in file order. Raises `Damage` where the rest cannot be read."""
    position = 0
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        header = source.read_at(position, BLOCK)
        if len(header) < BLOCK:
            if not position:
                raise Damage("not_a_shard" if header else "empty_shard")
            between = source.ends_at(position)
            raise Damage("truncated_tar", "no end-of-archive mark" if between else "", between=between)
        if not header.strip(b"\0"):
            return
        try:
            stated, size = _number(header[148:156]), _number(header[124:136])
        except ValueError:
            stated, size = -1, 0
        if stated != sum(header) - sum(header[148:156]) + 256:
            raise Damage("corrupt_tar" if position else "not_a_shard", f"at byte {position}" if position else "")
        kind = header[156:157]
        offset = position + BLOCK
        if kind in b"LKxg":
            position = offset + -(-size // BLOCK) * BLOCK
            if size > EXTENSION_LIMIT:
                raise Damage("corrupt_tar", f"a name of {size} bytes at byte {offset}")
            data = source.read_at(offset, size)
            if len(data) < size:
                raise Damage("truncated_tar")
            if kind == b"L":
                long_name = data.rstrip(b"\0")
            elif kind == b"x":
                records = _pax(data)
                long_name = records.get(b"path", long_name)
                if b"size" in records:
                    if not records[b"size"].isdigit() or len(records[b"size"]) > 19:
                        raise Damage("corrupt_tar", f"a size that is no number at byte {offset}")
                    long_size = int(records[b"size"])
            continue
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        if long_name is not None:
            name = long_name
        if long_size is not None:
            size = long_size
        long_name = long_size = None
        # Links, devices and folders have no data, whatever their size field says.
        held = 0 if kind in b"123456" else size
        source.check_extent(offset + held, name)
        yield Member(name, held, offset, kind in b"\x000" or kind == b"7", kind == b"5" or name.endswith(b"/"))
        position = offset + -(-held // BLOCK) * BLOCK
