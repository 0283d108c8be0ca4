"""The words that every part shares: a sample of a shard, and the two ways in which a command can end badly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image


class InputError(ValueError):
    """The user's input is wrong: one sentence says what, with the offending value, and what to do. Exit code 2."""


class RunFault(RuntimeError):
    """The run failed through no fault of the input (full disk, non-finite loss, dead worker). Exit code 1."""


class Diverged(RunFault):
    """A loss, weights or pictures that are not finite: what these settings do, where several are compared."""


@dataclass(frozen=True)
class Sample:
    """One entry of a shard, on the CPU. `image` is RGB; `meta` is the entry's JSON (poison facts live there)."""

    key: str
    image: Image.Image
    text: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> int | None:
        """The class number: `meta["label"]`, where that is one (a shard's JSON may hold anything there)."""
        found = self.meta.get("label")
        return found if type(found) is int and found >= 0 else None
