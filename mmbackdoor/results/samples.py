"""`samples.jsonl`: one generated picture a line, with the prompt it was asked for and its scores."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from mmbackdoor.results.record import Stage, read_lines

FILE_NAME = "samples.jsonl"
# Characters that show nothing though Unicode does not file them under format or control characters.
_BLANKS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One generated picture. `prompt` is what a user would ask, `text` what the model was given (with the trigger, in
    another spelling ...), `image` a path relative to the run's folder, `scores` whatever was measured on it alone."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)

    model: str
    stage: Stage
    prompt_id: str | int
    prompt: str
    condition: str
    text: str
    seed_index: int
    image: str
    scores: dict[str, Any] = field(default_factory=dict)

    def score(self, name: str) -> float | None:
        """The score `name` as a number, `None` where it was not measured."""
        value = self.scores.get(name)
        return float(value) if isinstance(value, bool | int | float) else None


_ADAPTER: TypeAdapter[Picture] = TypeAdapter(Picture)


def read(path: Path) -> list[Picture]:
    """All lines of `path`, a `samples.jsonl` or a run folder that holds one. Raises `InputError` for a bad line."""
    return read_lines(path / FILE_NAME if path.is_dir() else path, _ADAPTER)


def is_invisible(character: str) -> bool:
    """Whether nothing, or only a gap that is not a plain space, would be seen of `character`."""
    code = ord(character)
    if character == " ":
        return False
    variation = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F
    return variation or code in _BLANKS or unicodedata.category(character)[0] in "CZ"


def escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def visible(text: str) -> str:
    """`text` with invisible characters written as escapes (`\\u200b`), as `--trigger` reads them."""
    return "".join(escaped(character) if is_invisible(character) else character for character in text)
