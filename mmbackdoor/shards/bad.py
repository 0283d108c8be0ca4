"""What is wrong with shards: problems counted by kind, with the first few of each kind named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmbackdoor.types import InputError

KINDS = {
    "empty_shard": "the file is empty",
    "not_a_shard": "the file is neither a tar nor a gzipped tar",
    "corrupt_tar": "a damaged tar header; what follows it is lost",
    "truncated_tar": "the tar ends too early",
    "corrupt_gzip": "damaged gzip data; what follows it is lost",
    "truncated_gzip": "the gzip ends too early",
    "gzip_bomb": "the gzip unpacks to far more than images can",
    "unreadable": "reading the file failed",
    "wrong_size": "sizes.json gives another number of samples than the shard holds",
    "missing_file": "no such file",
    "outside_folder": "a path that leaves the folder",
    "not_a_file": "a link, device or other entry that is no plain file",
    "unsafe_name": "a name that leaves its folder or is no plain text",
    "pickled_member": "a member in a pickled format, which is never read",
    "duplicate_key": "a second sample with the same key",
    "several_images": "more than one image under one key",
    "missing_image": "no .jpg, .jpeg, .png or .webp",
    "missing_caption": "no caption",
    "empty_member": "a member of length zero",
    "large_member": "an image or JSON member above the size limit",
    "long_caption": "a caption above the size limit",
    "not_utf8": "text that is not UTF-8",
    "bad_json": "JSON that is no object or cannot be read",
    "bad_class": "a .cls that is no class number",
    "mislabelled_image": "an image of another format than its name says",
    "undecodable_image": "an image that cannot be decoded",
    "huge_image": "an image above the pixel limit",
}
EXAMPLES = 5


class Problem(NamedTuple):
    kind: str
    shard: str
    key: str
    detail: str

    def __str__(self) -> str:
        what = KINDS[self.kind] + (f" ({self.detail})" if self.detail else "")
        # ascii(): names come from strangers and are printed on terminals.
        return f"{self.shard}: {ascii(self.key)}: {what}" if self.key else f"{self.shard}: {what}"

    @property
    def mark(self) -> int:
        """The same in every process, as `hash` is not."""
        text = "\0".join(self[:3]).encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


class BadSample(ValueError):
    """A sample that cannot be used: `kind` (one of `KINDS`) and what was found."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{KINDS[kind]} ({detail})" if detail else KINDS[kind])
        self.kind = kind
        self.detail = detail


class BadSamples:
    """Counts problems by kind; the same problem met again (next epoch, another reader) counts once.

    `examples` holds the first `EXAMPLES` of each kind, or all of them with `keep_all`.
    """

    def __init__(self, keep_all: bool = False) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[Problem]] = {}
        self._keep_all = keep_all
        self._seen: dict[int, str] = {}
        self._news: list[Problem] = []

    def add(self, kind: str, shard: str, key: str = "", detail: str = "") -> None:
        self.add_problem(Problem(kind, shard, key, detail))

    def add_problem(self, problem: Problem) -> None:
        mark = problem.mark
        if mark in self._seen:
            return
        self._seen[mark] = problem.kind
        self._news.append(problem)
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        examples = self.examples.setdefault(problem.kind, [])
        if self._keep_all or len(examples) < EXAMPLES:
            examples.append(problem)

    def take_news(self) -> list[Problem]:
        """The problems added since the last call: how a loader worker tells the main process."""
        news, self._news = self._news, []
        return news

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores; `add_state` takes it back."""
        examples = [list(problem) for some in self.examples.values() for problem in some]
        return {"seen": {str(mark): kind for mark, kind in self._seen.items()}, "examples": examples}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Raises `ValueError`, `TypeError`, `AttributeError` or `KeyError` for what `state` did not make."""
        examples = [Problem(*map(str, values)) for values in state["examples"]]
        seen = {int(mark): kind for mark, kind in state["seen"].items()}
        if unknown := {*seen.values(), *(problem.kind for problem in examples)} - KINDS.keys():
            raise ValueError(f"unknown kinds {sorted(map(str, unknown))}")
        news = list(self._news)
        for problem in examples:
            self.add_problem(problem)
        self._news = news
        for mark in seen.keys() - self._seen.keys():
            self._seen[mark] = seen[mark]
            self.counts[seen[mark]] = self.counts.get(seen[mark], 0) + 1
            self.examples.setdefault(seen[mark], [])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """The form for `run.json`: total, counts by kind, the first few of each kind."""
        examples = {kind: [problem._asdict() for problem in some] for kind, some in sorted(self.examples.items())}
        return {"total": self.total, "counts": dict(sorted(self.counts.items())), "examples": examples}

    def lines(self) -> list[str]:
        """For people: a line for each kind, and one for each example beneath."""
        lines = []
        for kind in sorted(self.counts):
            lines.append(f"{self.counts[kind]} x {kind}: {KINDS[kind]}")
            lines += [f"    {problem}" for problem in self.examples[kind]]
            more = self.counts[kind] - len(self.examples[kind])
            lines += [f"    and {more} more"] if more else []
        return lines


def note_key(key: str, path: str, known: dict[str, str]) -> None:
    """Puts into `known` that the sample `key` is in the shard `path`. Raises `InputError` where there is one of this key
    already: a choice by key would mean both, and count them as one."""
    if key in known:
        raise InputError(
            f"the key {key!r} comes twice, in {known[key]!r} and in {path!r}, and samples are picked by their keys; take "
            "one set at a time, or give one of them keys of its own (data/README.md says how)"
        )
    known[key] = path
