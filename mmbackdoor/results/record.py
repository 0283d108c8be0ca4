"""`results.jsonl`: one measured number a line, with its interval and where it came from.

Files are always rewritten to a temporary name and renamed, so a reader never sees half a line.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmbackdoor.shards.write import part_of
from mmbackdoor.types import InputError, RunFault

FILE_NAME = "results.jsonl"
SCHEMA = 1
Stage = Literal["clean", "poisoned", "cleaned", "unknown"]
STAGES: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One value of one metric for one model under one condition.

    `condition` is `clean`, `triggered` or `near:<kind>` (`near:seen:<kind>`, `near:unseen:<kind>`). Rates are
    fractions in [0, 1] with `unit="fraction"`, and only tables turn them into per cent. `n` counts trials,
    `n_prompts` distinct prompts. `notes` holds what qualifies the number: `features` and `reference` of a
    distribution distance, and `warnings` (a list of sentences).

    Raises `InputError` for a value that is not finite, an interval without order, or an unknown stage.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    schema: Literal[1] = SCHEMA
    run_id: str
    stage: Stage
    model: dict[str, str | None]
    attack: str | None = None
    defense: str | None = None
    backdoor: dict[str, str | None] | None = None
    suite: dict[str, str | None]
    condition: str
    metric: str
    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    ci_method: str | None = None
    n: int
    n_prompts: int | None = None
    unit: str = "fraction"
    higher_is_better: bool | None = None
    seed: int | None = None
    notes: dict[str, Any] | list[str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"record {self.stage}/{self.condition}/{self.metric}"
        if self.stage not in STAGES:
            raise InputError(f"{where}: stage {self.stage!r} is unknown; choose from {', '.join(STAGES)}")
        if not {"id", "sha256"} == set(self.model):
            raise InputError(f"{where}: model needs exactly the keys id and sha256, not {sorted(self.model)}")
        if not {"name", "sha256"} == set(self.suite):
            raise InputError(f"{where}: suite needs exactly the keys name and sha256, not {sorted(self.suite)}")
        for name in ("value", "ci_low", "ci_high"):
            number = {"value": self.value, "ci_low": self.ci_low, "ci_high": self.ci_high}[name]
            if number is not None and not abs(number) < float("inf"):
                raise InputError(f"{where}: {name} is {number}, which is no measured number; leave the record out")
        if (self.ci_low is None) != (self.ci_high is None):
            raise InputError(f"{where}: give both ci_low and ci_high, or neither")
        if self.ci_low is not None and self.ci_high is not None and self.ci_low > self.ci_high:
            raise InputError(f"{where}: ci_low {self.ci_low} is above ci_high {self.ci_high}")

    @property
    def key(self) -> tuple[str | int | None, ...]:
        """What makes two records answers to the same question."""
        return (self.stage, self.model["id"], self.suite["name"], self.condition, self.metric, self.seed)

    @property
    def warnings(self) -> list[str]:
        """The sentences in `notes` that qualify this number."""
        found = self.notes.get("warnings", []) if isinstance(self.notes, dict) else self.notes
        return [found] if isinstance(found, str) else [str(sentence) for sentence in found]


def asked(records: Iterable[Record]) -> str:
    """What the models were asked about: `pictures`, where they were classified or retrieved, else `prompts`."""
    of_pictures = any(record.metric in ("top1", "displacement") or "retrieval" in record.metric for record in records)
    return "pictures" if of_pictures else "prompts"


_ADAPTER: TypeAdapter[Record] = TypeAdapter(Record)
Line = TypeVar("Line")


def write_text(path: Path, text: str) -> None:
    """Write `path` as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path` through a temporary name beside it, of this process alone: calls side by side may write the same
    file. Raises `InputError` where the place is not writable and `RunFault` where the disk is full or broken."""
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise RunFault(f"writing {str(path)!r} failed ({error.strerror}); make room and start again") from error
        raise InputError(f"cannot write {str(path)!r} ({error.strerror}); choose a writable --output_dir") from error


def to_line(record: Record) -> str:
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)


def read_lines(path: Path, adapter: TypeAdapter[Line]) -> list[Line]:
    """The lines of a JSON-lines file. Raises `InputError` that names file and line for the first bad one."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise InputError(f"there is no {str(path)!r}; give the folder of a run that was evaluated") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); give a run's own file") from error
    rows = []
    # splitlines() would also split inside JSON strings, at U+2028 for instance
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(adapter.validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            reason = f"{place}: {first['msg']}" if place else first["msg"]
            raise InputError(f"{str(path)!r}, line {number}: {reason}; mend or remove that line") from error
    return rows


def read(path: Path) -> list[Record]:
    """All records of `path`, a `results.jsonl` or a run folder that holds one, in file order."""
    return read_lines(path / FILE_NAME if path.is_dir() else path, _ADAPTER)


def replace(path: Path, records: Iterable[Record]) -> None:
    """Make `path` hold exactly `records`."""
    write_text(path, "".join(to_line(record) + "\n" for record in records))


def append(path: Path, records: Iterable[Record]) -> None:
    """Add `records` behind those that `path` holds."""
    replace(path, [*(read(path) if path.exists() else []), *records])


def merge(path: Path, records: Iterable[Record]) -> None:
    """Add `records`; one that answers the same question as an older one (`Record.key`) takes its place."""
    merged = {record.key: record for record in (read(path) if path.exists() else [])}
    merged.update({record.key: record for record in records})
    replace(path, merged.values())
