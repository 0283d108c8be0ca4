"""Files that say what a folder was made with: they change when a call is through, never when it is stopped or refused.

Other recipes begin with what such a file says, beside lines that only a finished call writes: both have to be of one
call. Calls with the same settings may run beside each other in one folder: none writes over what another reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmbackdoor.results.record import write_text


def draft(path: Path) -> Path:
    """Where the text for `path` is until its call is through, if `path` holds another one."""
    return path.with_name(f"{path.stem}.new{path.suffix}")


def begin(files: Mapping[Path, str], main: bool) -> dict[Path, Path]:
    """Where each text of `files` (path -> text) is while a call goes on: at its path, if that was free or holds it,
    else at its draft. The `main` process writes; the others must not read before it has."""
    places = {}
    for path, text in files.items():
        if main and not path.is_file():
            write_text(path, text)
        places[path] = path if _holds(path, text) or not path.is_file() else draft(path)
        if main and places[path] != path:
            write_text(places[path], text)
    return places


def settle(files: Mapping[Path, str]) -> None:
    """The call is through: each text is at its path."""
    for path, text in files.items():
        if not _holds(path, text):
            write_text(path, text)
        draft(path).unlink(missing_ok=True)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
