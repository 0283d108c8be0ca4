"""Labelled or captioned pictures to measure a CLIP on: CLIP_benchmark's webdataset layout, or our own shards.

CLIP_benchmark's is a folder with `test/0.tar`, ..., `test/nshards.txt`, `classnames.txt` and
`zeroshot_classification_templates.txt`, each sample a picture with its label (`.cls`), or, where `dataset_type.txt`
says retrieval, with its captions (`.txt`, one a line). Other shards carry a label (`.cls`, or `label` in the `.json`), a
caption, or both.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmbackdoor.evaluate.zeroshot import Templates
from mmbackdoor.seeding import derive_seed
from mmbackdoor.shards.bad import BadSample, BadSamples, Problem
from mmbackdoor.shards.read import Entry, entries, expand
from mmbackdoor.types import InputError, Sample

SPLIT = "test"
NSHARDS = "nshards.txt"
CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class ClipData:
    """Where the pictures are and what the files beside them say. `classnames` is empty where there are none."""

    name: str
    shards: tuple[str, ...]
    classnames: tuple[str, ...] = ()
    templates: Templates = ()
    caption_per_line: bool = False

    @property
    def stamp(self) -> str:
        """Changes whenever a shard does: name, size and time of each."""
        stats = [Path(path).stat() for path in self.shards]
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.shards, stats, strict=True)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def captions(self, sample: Sample) -> tuple[str, ...]:
        """The captions of a sample; none where it has only a label."""
        if not self.caption_per_line:
            return (sample.text,) if sample.text else ()
        return tuple(dict.fromkeys(line.strip() for line in sample.text.split("\n") if line.strip()))


def open_data(spec: str) -> ClipData:
    """Raises `InputError` where there are no shards, or another number of them than `nshards.txt` says."""
    if not spec:
        raise InputError("which pictures? Give --data with a folder in CLIP_benchmark's layout, or with shards")
    folder = Path(spec)
    if (folder / NSHARDS).is_file():
        folder = folder.parent
    elif not (folder / SPLIT).is_dir():
        paths = expand(spec)
        beside = Path(paths[0]).parent
        stem = Path(paths[0]).name.split(".")[0].rstrip("0123456789").rstrip("-_")
        return _described(beside, stem or beside.name, paths)
    split = folder / SPLIT if (folder / SPLIT).is_dir() else Path(spec)
    paths = expand(split)
    stated = _lines(split / NSHARDS)
    if stated and stated[0] != str(len(paths)):
        raise InputError(f"{str(split)!r} has {len(paths)} shards, but {NSHARDS} says {stated[0]}; copy all of them")
    return _described(folder, folder.resolve().name, paths)


def check_apart(pretrain: str, clean: str, selection: str, evaluate: str) -> None:
    """Raises `InputError` where data share a shard that are not to: those that a choice looks at or that it is judged on
    with each other, or with those that were trained on."""
    trained, looked = {"pretrain.train_data": pretrain, "clean.train_data": clean}, {"selection_data": selection}
    looked |= {"evaluate.data": evaluate}
    named, files = trained | looked, {name: expand(spec) for name, spec in trained.items()}
    files |= {name: open_data(spec).shards for name, spec in looked.items()}
    resolved = {name: {Path(path).resolve() for path in paths} for name, paths in files.items()}
    for (one, mine), (other, theirs) in itertools.combinations(resolved.items(), 2):
        # A cleaning may well have the pairs of the pre-training.
        if other in looked and (shared := mine & theirs):
            raise InputError(
                f"{one} {named[one]!r} and {other} {named[other]!r} share {len(shared)} shards, such as "
                f"{str(min(shared))!r}: what is picked would be judged on pictures that were looked at before; keep them apart"
            )


def _described(folder: Path, name: str, paths: Iterable[str]) -> ClipData:
    retrieval = _lines(folder / DATASET_TYPE)[:1] == ["retrieval"]
    names, templates = (tuple(_lines(folder / file)) for file in (CLASSNAMES, TEMPLATES))
    return ClipData(name, tuple(paths), names, templates, retrieval)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} cannot be read ({error})") from error


def chosen_keys(data: ClipData, count: int | None, seed: int) -> frozenset[str] | None:
    """`count` keys picked by a hash of them, `None` for all."""
    if count is None:
        return None
    keys = {entry.key for _, entry in _every(data, BadSamples())}
    return frozenset(sorted(keys, key=lambda key: (derive_seed(seed, "evaluation", key), key))[:count])


def highest_label(data: ClipData) -> tuple[int, str]:
    """The highest label and the key of its picture; -1 where there are none. No picture is read."""
    highest, of = -1, ""
    for _, entry in _every(data, BadSamples()):
        label = entry.label()
        if label is not None and label > highest:
            highest, of = label, entry.key
    return highest, of


def _every(data: ClipData, report: BadSamples) -> Iterator[tuple[str, Entry]]:
    for path in data.shards:
        for entry in entries(path, report):
            yield path, entry


def undecoded(
    data: ClipData, report: BadSamples, keys: frozenset[str] | None = None, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, str, Entry]]:
    """(place, shard, entry) of this process's share; a key that comes again, in another shard, is a problem."""
    seen: set[str] = set()
    for place, (path, entry) in enumerate(_every(data, report)):
        if entry.key in seen:
            report.add("duplicate_key", path, entry.key)
            continue
        seen.add(entry.key)
        if (keys is None or entry.key in keys) and place % world_size == rank:
            yield place, path, entry


def decoded(path: str, entry: Entry) -> Sample | Problem:
    """The sample, or what is wrong with it. A picture needs a label or a caption."""
    try:
        return entry.decode(require_text=False)
    except BadSample as bad:
        return Problem(bad.kind, path, entry.key, bad.detail)
