"""Chores for shards: what is wrong with them, what they hold, the same samples in another number of shards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from mmbackdoor.shards.bad import BadSample, BadSamples, Problem
from mmbackdoor.shards.decode import IMAGE_FORMATS
from mmbackdoor.shards.read import entries, expand, read_sizes, shard_sizes
from mmbackdoor.shards.write import ShardWriter, tar_member
from mmbackdoor.types import InputError, RunFault


@dataclass(frozen=True)
class CheckReport:
    """`samples` good ones in `shards` shards, and every problem."""

    shards: int
    samples: int
    problems: BadSamples

    @property
    def ok(self) -> bool:
        return not self.problems.total

    def __str__(self) -> str:
        found = f"{self.problems.total} problems" if self.problems.total else "no problems"
        return "\n".join([f"{self.shards} shards, {self.samples} good samples, {found}", *self.problems.lines()])


def _check_shard(path: str) -> tuple[int, list[Problem]]:
    report = BadSamples()
    good = held = 0
    for entry in entries(path, report):
        held += 1
        try:
            # A labelled image without a caption is fine in an evaluation set.
            entry.decode(require_text=False)
            good += 1
        except BadSample as bad:
            report.add(bad.kind, path, entry.key, bad.detail)
    stated = read_sizes(os.path.dirname(path) or ".").get(os.path.basename(path), held)
    if stated != held:
        report.add("wrong_size", path, "", f"{stated} stated, {held} found")
    return good, report.take_news()


def check(spec: str | Path | Sequence[str | Path], workers: int = 1) -> CheckReport:
    """Decode every sample of the shards, `workers` processes at a time; all problems with shard and key."""
    if workers < 1:
        raise InputError(f"{workers} workers are impossible; give 1 or more")
    paths = expand(spec)
    samples, problems = 0, BadSamples(keep_all=True)
    for good, found in tqdm(_checked(paths, workers), total=len(paths), unit="shard", disable=None):
        samples += good
        for problem in found:
            problems.add_problem(problem)
    return CheckReport(len(paths), samples, problems)


def _checked(paths: list[str], workers: int) -> Iterable[tuple[int, list[Problem]]]:
    if workers == 1 or len(paths) == 1:
        yield from map(_check_shard, paths)
        return
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_check_shard, paths)
        except BrokenProcessPool as error:
            raise RunFault("a process that checked shards was killed (out of memory?); use fewer --workers") from error


@dataclass(frozen=True)
class Info:
    shards: int
    samples: int
    bytes: int
    example: str

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB"
        return f"{self.shards} shards, {self.samples} samples, {size}\n{self.example}"


def info(spec: str | Path | Sequence[str | Path]) -> Info:
    """How many shards and samples (from `sizes.json` where the shards are large), and the first good sample."""
    paths = expand(spec)
    samples = sum(shard_sizes(paths, BadSamples()))
    return Info(len(paths), samples, sum(map(os.path.getsize, paths)), _example(paths))


def _example(paths: list[str]) -> str:
    for path in paths:
        for entry in entries(path, BadSamples()):
            try:
                sample = entry.decode(require_text=False)
            except BadSample:
                continue
            image = next(extension for extension in entry.parts if extension in IMAGE_FORMATS)
            # ascii(): captions come from strangers and go to a terminal.
            return (
                f"first sample {ascii(sample.key)}: {sample.image.width} x {sample.image.height} .{image}, "
                f"caption {ascii(sample.text[:100])}, JSON keys: {', '.join(map(ascii, sample.meta)) or 'none'}"
            )
    return "no sample can be read; `mmbackdoor shards check` says why"


@dataclass(frozen=True)
class SplitReport:
    folder: Path
    prefix: str
    shards: int
    samples: int
    problems: BadSamples

    def __str__(self) -> str:
        last = self.shards - 1
        head = f"{self.samples} samples in {self.shards} shards: {self.folder}/{self.prefix}-{{000000..{last:06d}}}.tar"
        return "\n".join([head, *self.problems.lines()])


def split(spec: str | Path | Sequence[str | Path], out: Path, count: int) -> SplitReport:
    """Write the samples of `spec`, their bytes unchanged, as `count` shards of equal size (by one) in folder `out`.

    What the tar headers show to be wrong is left out and reported. Raises `InputError` for a `count` that is
    impossible and for keys that occur in two shards.
    """
    paths, problems = expand(spec), BadSamples()
    total = sum(shard_sizes(paths, problems, exact=True))
    if not 1 <= count <= total:
        raise InputError(f"{total} samples cannot be split into {count} shards; give a --count from 1 to {total}")
    prefix = re.sub(r"[^A-Za-z0-9_-]", "_", re.sub(r"[-_]?\d*\.(tar|tar\.gz|tgz)$", "", os.path.basename(paths[0])))
    number, keys = 0, set()
    with ShardWriter(out, prefix or "shard", samples_per_shard=total) as writer:
        for path in tqdm(paths, unit="shard", disable=None):
            for entry in entries(path, problems):
                if entry.key in keys:
                    raise InputError(f"the key {entry.key!r} occurs in two shards, the second is {path!r}; rename one")
                keys.add(entry.key)
                writer.add(b"".join(tar_member(f"{entry.key}.{end}", data) for end, data in entry.read().items()))
                number += 1
                if number * count // total > (number - 1) * count // total:
                    writer.end_shard()
    return SplitReport(Path(out), prefix or "shard", len(writer.sizes), number, problems)
