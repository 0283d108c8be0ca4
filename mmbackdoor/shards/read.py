"""Webdataset shards in: which files a `--train_data` means, and the samples of a shard, whoever made it."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mmbackdoor.shards.bad import BadSample, BadSamples, note_key
from mmbackdoor.shards.decode import IMAGE_FORMATS, PICKLED, SIZE_LIMITS, decode_caption, decode_label, decode_sample
from mmbackdoor.shards.tar import Damage, GzipFile, PlainFile, is_gzip, members, open_source
from mmbackdoor.types import InputError, Sample

SUFFIXES = (".tar", ".tar.gz", ".tgz")
SIZES_FILE = "sizes.json"
MAX_SHARDS = 1_000_000
MAX_WEIGHT = 10_000
SCAN_BYTES = 256 << 20
INDEXED_TAR = 256 << 20
INDEXED_GZIP = 8 << 20
INDEX_BYTES = 256 << 20

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Entry:
    """One sample of a shard, not yet decoded: `parts` maps extensions to bytes, or to (offset, size) in `source`, which
    a gzipped shard's sample does without."""

    __slots__ = ("key", "parts", "source")

    def __init__(self, key: str, parts: dict[str, bytes | tuple[int, int]], source: PlainFile | None) -> None:
        self.key, self.parts, self.source = key, parts, source

    def read(self, but: Collection[str] = ()) -> dict[str, bytes]:
        """The members' bytes, those with an extension in `but` left out. Raises `BadSample` where the file has become
        shorter since it was scanned."""
        parts = {}
        for extension, part in self.parts.items():
            if extension in but:
                continue
            data = part if isinstance(part, bytes) else self.source.read_at(*part)
            if not isinstance(part, bytes) and len(data) < part[1]:
                raise BadSample("unreadable", "the file became shorter while it was read")
            parts[extension] = data
        return parts

    def caption(self) -> str:
        """The text of the sample, empty where it has none; its picture is not read. Raises `BadSample`."""
        return decode_caption(self.read(but=IMAGE_FORMATS))

    def label(self) -> int | None:
        """The class number, `None` where it has none that can be read; its picture is not read."""
        try:
            return decode_label(self.read(but=IMAGE_FORMATS))
        except BadSample:
            return None

    @property
    def weight(self) -> int:
        """About how many bytes of memory this takes."""
        return 600 + sum(len(part) for part in self.parts.values() if isinstance(part, bytes))

    def decode(self, require_text: bool = True) -> Sample:
        """Raises `BadSample`."""
        try:
            return decode_sample(self.key, self.read(), require_text)
        except OSError as error:
            raise BadSample("unreadable", error.strerror or str(error)) from None


def _braces(text: str) -> list[str]:
    """All texts that `text` with braces means. Raises `InputError` above `MAX_SHARDS`."""
    found = [""]
    while text:
        head, opening, rest = text.partition("{")
        inside, closing, tail = rest.partition("}")
        span = _RANGE.fullmatch(inside)
        if not closing:
            head, options, tail = text, [""], ""
        elif span:
            first, last = span.groups()
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            options = range(int(first), int(last) + 1) if max(len(first), len(last)) < 19 else range(MAX_SHARDS + 1)
        else:
            width, options = 0, inside.split(",")
        if len(found) * len(options) > MAX_SHARDS:
            raise InputError(f"the pattern means more than {MAX_SHARDS} shards; check the numbers in its braces")
        words = [f"{option:0{width}d}" if isinstance(option, int) else option for option in options]
        found = [before + head + word for before in found for word in words]
        text = tail
    return found


def _in_folder(folder: Path) -> list[str]:
    found = sorted(str(file) for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    sets = sorted({re.sub(r"[-_]?\d*\.(tar|tar\.gz|tgz)$", "", os.path.basename(file)) for file in found})
    if not found:
        raise InputError(f"the folder {str(folder)!r} holds no .tar or .tar.gz shards")
    if len(sets) > 1:
        raise InputError(
            f"the folder {str(folder)!r} holds several shard sets ({', '.join(sets[:6])}); "
            f"name one, for instance '{folder}/{sets[-1]}-*.tar'"
        )
    return found


def _expand_one(spec: str) -> list[str]:
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", spec)
    if spec.startswith("pipe:") or (scheme and not os.path.exists(spec)):
        raise InputError(f"{spec!r} is no local file; shards are read from local files only, so copy them here first")
    if os.path.isdir(spec):
        return _in_folder(Path(spec))
    if not spec:
        raise InputError("an empty name stands for no shards; pass a file, a folder or a pattern")
    paths = []
    for name in [spec] if os.path.exists(spec) else _braces(spec):
        if os.path.exists(name) or not glob.has_magic(name):
            paths.append(name)
            continue
        found = sorted(glob.glob(name))
        if not found:
            raise InputError(f"no file matches {name!r}; check the path of the shards")
        paths += found
    missing = [path for path in paths if not os.path.isfile(path)]
    locked = [path for path in paths if not missing and not os.access(path, os.R_OK)]
    if locked:
        raise InputError(
            f"{len(locked)} of {len(paths)} shards may not be read, the first is {locked[0]!r}; see its rights"
        )
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards of {spec!r} do not exist, the first is {missing[0]!r}; "
            "check the path"
        )
    return paths


def _sources(spec: str | Path | Sequence[str | Path]) -> list[list[str]]:
    specs = [spec] if isinstance(spec, (str, Path)) else list(spec)
    return [_expand_one(part) for each in specs for part in str(each).split("::")]


def shard_weights(spec: str | Path | Sequence[str | Path], factors: str | None) -> tuple[float, ...]:
    """The weight of each shard of `spec`, as `factors` (`2::1`, a number for each source `a::b`) says; empty for none.

    Raises `InputError` where the numbers do not fit the sources.
    """
    if factors is None:
        return ()
    sources, words = _sources(spec), factors.split("::")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != len(sources) or not all(0 < number <= MAX_WEIGHT for number in numbers):
        raise InputError(
            f"--train_data_upsampling_factors {factors!r} does not fit {len(sources)} sources; give {len(sources)} "
            f"numbers above 0 and up to {MAX_WEIGHT}, joined by '::'"
        )
    return tuple(number for number, paths in zip(numbers, sources, strict=True) for _ in paths)


def expand(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """The shard files that `spec` means: a file, a folder (all its shards), braces `{000..099}`, globs, `a::b`.

    Raises `InputError` for missing files, URLs, `pipe:` and folders with more than one shard set.
    """
    paths = [path for source in _sources(spec) for path in source]
    if not paths:
        raise InputError("no shards were given; pass a file, a folder or a pattern such as 'a-{000000..000009}.tar'")
    if len(paths) > MAX_SHARDS:
        raise InputError(f"{spec!r} means more than {MAX_SHARDS} shards; check the numbers in braces")
    return paths


def _key_and_extension(name: bytes) -> tuple[str, str] | None:
    """`None` for names that belong to no sample (`.hidden`, `__meta__`, no extension). Raises `BadSample`."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise BadSample("unsafe_name") from None
    match = _NAME.fullmatch(text.removeprefix("./"))
    if ".." in text.split("/") or text.startswith("/") or "\\" in text or not text.isprintable() or len(text) > 1024:
        raise BadSample("unsafe_name")
    if match is None or match[1].rsplit("/", 1)[-1].startswith("__"):
        return None
    return match[1], match[2].lower()


def entries(path: str, report: BadSamples) -> Iterator[Entry]:
    """The samples of a shard in file order, judged by tar headers alone; problems are counted in `report`."""
    seen: set[str] = set()
    key: str | None = None
    parts: dict[str, bytes | tuple[int, int]] = {}
    fault: tuple[str, str] | None = None
    source: PlainFile | GzipFile | None = None

    def finished() -> Entry | None:
        if key is None or not (parts or fault):
            return None
        images = sum(extension in IMAGE_FORMATS for extension in parts)
        if key in seen:
            problem = ("duplicate_key", "")
        elif fault:
            problem = fault
        elif images != 1:
            problem = ("several_images" if images else "missing_image", "")
        elif parts.keys() <= IMAGE_FORMATS.keys():
            problem = ("missing_caption", "")
        else:
            problem = None
        seen.add(key)
        if problem:
            report.add(problem[0], path, key, problem[1])
            return None
        return Entry(key, parts, source if isinstance(source, PlainFile) else None)

    try:
        source = open_source(path)
        for member in members(source):
            if not member.plain:
                if not member.folder:
                    report.add("not_a_file", path, member.name.decode("utf-8", "replace"))
                continue
            try:
                name = _key_and_extension(member.name)
            except BadSample as bad:
                stem = member.name.decode("utf-8", "replace").rpartition(".")[0]
                report.add(bad.kind, path, stem[:200])
                continue
            if name is None or name[1] not in SIZE_LIMITS:
                if name and name[1].rpartition(".")[2] in PICKLED:
                    report.add("pickled_member", path, name[0], f".{name[1]}")
                continue
            if name[0] != key or name[1] in parts:
                entry = finished()
                if entry:
                    yield entry
                key, parts, fault = name[0], {}, None
            extension = name[1]
            if not 0 < member.size <= SIZE_LIMITS[extension]:
                large = "long_caption" if extension == "txt" else "bad_class" if extension == "cls" else "large_member"
                kind = large if member.size else "missing_caption" if extension == "txt" else "empty_member"
                fault = fault or (kind, f".{extension} of {member.size} bytes")
                continue
            if source.random_access:
                parts[extension] = (member.offset, member.size)
            else:
                data = source.read_at(member.offset, member.size)
                if len(data) < member.size:
                    raise Damage("truncated_tar", "", member.name)
                parts[extension] = data
    except Damage as damage:
        report.add(damage.kind, path, "", damage.detail)
        # The last sample may lack a member (its JSON, say) unless the cut lies in another sample's data.
        stem = damage.member.rpartition(b".")[0].decode("utf-8", "replace") if damage.member else key
        if stem == key and not damage.between:
            key = None
    except OSError as error:
        report.add("unreadable", path, "", error.strerror or str(error))
    entry = finished()
    if entry:
        yield entry


class ShardIndex:
    """Remembers the entries of small shards, so that reading from their middle costs nothing.

    Of a gzipped shard it keeps the content. It holds about `INDEX_BYTES` and forgets what was used longest ago. With
    `keys`, only samples of these keys are there.
    """

    def __init__(self, keys: frozenset[str] | None = None) -> None:
        self.keys = keys
        self._known: OrderedDict[str, list[Entry]] = OrderedDict()
        self._weights: dict[str, int] = {}

    def entries(self, path: str, report: BadSamples, start: int = 0) -> Iterator[Entry]:
        """The entries of a shard from number `start` on."""
        if path in self._known:
            self._known.move_to_end(path)
        else:
            try:
                large = os.path.getsize(path) > (INDEXED_GZIP if is_gzip(path) else INDEXED_TAR)
            except OSError as error:
                report.add("unreadable", path, "", error.strerror or str(error))
                return iter(())
            if large:
                return itertools.islice(self._wanted(path, report), start, None)
            self._add(path, list(self._wanted(path, report)))
        return itertools.islice(self._known[path], start, None)

    def _wanted(self, path: str, report: BadSamples) -> Iterator[Entry]:
        return (entry for entry in entries(path, report) if self.keys is None or entry.key in self.keys)

    def _add(self, path: str, found: list[Entry]) -> None:
        self._known[path] = found
        self._weights[path] = sum(entry.weight for entry in found)
        while sum(self._weights.values()) > INDEX_BYTES and len(self._known) > 1:
            del self._weights[self._known.popitem(last=False)[0]]


def read_sizes(folder: str | Path) -> dict[str, int]:
    """`sizes.json` of a folder of shards: file name -> number of samples; empty where there is none."""
    file = Path(folder) / SIZES_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8")) if file.stat().st_size <= 256 << 20 else None
    except (OSError, ValueError, RecursionError):
        content = None
    good = isinstance(content, dict) and all(type(size) is int and size >= 0 for size in content.values())
    if not good:
        raise InputError(f"{str(file)!r} is no map of shard names to numbers of samples; remove it or write it anew")
    return content


def shard_sizes(
    paths: Sequence[str],
    report: BadSamples,
    exact: bool = False,
    index: ShardIndex | None = None,
    distinct: bool = False,
) -> list[int]:
    """The number of samples of each shard: counted where that is cheap or `exact`, else from `sizes.json`.

    A shard that `sizes.json` lacks is counted. A count that differs from `sizes.json` is put in `report`. Where `index`
    is limited to some keys, these are counted. With `distinct`, raises `InputError` for a key that is counted twice.
    """
    index = index or ShardIndex()
    met: dict[str, str] = {}

    def counted(path: str) -> int:
        size = 0
        for entry in index.entries(path, report):
            size += 1
            if distinct:
                note_key(entry.key, path, met)
        return size

    if index.keys is not None:
        return [counted(path) for path in paths]
    known = {folder: read_sizes(folder) for folder in {os.path.dirname(path) or "." for path in paths}}
    count_all = exact or sum(os.path.getsize(path) for path in paths) <= SCAN_BYTES
    sizes = []
    for path in paths:
        stated = known[os.path.dirname(path) or "."].get(os.path.basename(path))
        if stated is None or count_all:
            size = counted(path)
            if stated is not None and stated != size:
                report.add("wrong_size", path, "", f"{stated} stated, {size} found")
            stated = size
        sizes.append(stated)
    return sizes


def iterate_shard(path: str, report: BadSamples, require_text: bool = True) -> Iterator[Sample]:
    """The good samples of one shard in file order; every problem is skipped and counted in `report`."""
    for entry in entries(path, report):
        try:
            yield entry.decode(require_text)
        except BadSample as bad:
            report.add(bad.kind, path, entry.key, bad.detail)


def iterate_captions(spec: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """Key and caption of all samples that have a readable one; no picture is read or decoded."""
    report = BadSamples()
    for path in expand(spec):
        for entry in entries(path, report):
            try:
                caption = entry.caption()
            except BadSample:
                continue
            if caption:
                yield entry.key, caption


def iterate_keys(spec: str | Path | Sequence[str | Path]) -> Iterator[str]:
    """The keys of all samples, from the tar headers alone. Raises `InputError` where two have the same."""
    report, met = BadSamples(), {}
    for path in expand(spec):
        for entry in entries(path, report):
            note_key(entry.key, path, met)
            yield entry.key
