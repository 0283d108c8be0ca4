"""What a cell of a benchmark of removals measured, picture by picture, in one small file.

With these files alone, brought together from wherever the cells were run, a benchmark pools its seeds: it needs neither
the models nor the pictures of a cell that has one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmbackdoor.config import to_yaml
from mmbackdoor.evaluate.removal_points import Seen
from mmbackdoor.results.record import write_bytes
from mmbackdoor.results.removal_benchmark import CLEAN, NONE, RemovalRun, Where
from mmbackdoor.results.run import completed, flat
from mmbackdoor.types import InputError

FILE_NAME = "scores.json.gz"


@dataclass(frozen=True)
class Asked:
    """A part of what a cell was asked for: plain `values`, or the settings of a recipe with this `config_type`."""

    values: Any
    config_type: type | None = None

    @classmethod
    def of(cls, cfg: Any) -> Self:
        """All settings of a recipe, and what is in the files that they name."""
        config = yaml.safe_load(to_yaml(cfg))
        leaves = [leaf for value in flat(config).values() for leaf in (value if isinstance(value, list) else [value])]
        files = sorted({leaf for leaf in leaves if isinstance(leaf, str) and Path(leaf).is_file()})
        contents = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
        return cls({"config": config, "files": contents}, type(cfg))

    def holds(self, before: Any, source: str) -> bool:
        """Whether `before`, of the file `source`, is the same. Settings that have come since had their defaults."""
        values = json.loads(json.dumps(self.values))
        if self.config_type is None or before is None:
            return before == values
        return before | {"config": completed(self.config_type, before["config"], source)} == values


@dataclass(frozen=True, kw_only=True)
class Values:
    """One metric of the pictures of one model: prompt -> number of the picture of it -> value."""

    metric: str
    condition: str
    values: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Model:
    where: Where
    seed: int
    measured: list[Values]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The file: what the cell was asked for, its removals, its models."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    asked: dict[str, Any]
    runs: list[RemovalRun]
    models: list[Model]


_ADAPTER = TypeAdapter(Scores)


def write(folder: Path, asked: Mapping[str, Asked], found: Sequence[Seen], runs: Sequence[RemovalRun]) -> None:
    """Leave what a finished cell found in its `folder`."""
    models = []
    for one in found:
        measured = []
        for (metric, condition), pictures in one.values.items():
            values: dict[str, dict[str, float]] = {}
            for (prompt, index), value in pictures.items():
                values.setdefault(prompt, {})[str(index)] = value
            measured.append(Values(metric=metric, condition=condition, values=values))
        models.append(Model(where=one.where, seed=one.seed, measured=measured))
    said = {name: one.values for name, one in asked.items()}
    content = asdict(Scores(asked=said, runs=list(runs), models=models))
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    # Without a time in it, the same scores are the same file.
    write_bytes(folder / FILE_NAME, gzip.compress(text.encode(), mtime=0))


def load(file: Path) -> Scores:
    """Raises `InputError` for a damaged file."""
    try:
        return _ADAPTER.validate_json(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, zlib.error, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{str(file)!r} is damaged ({reason}); remove it, and its cell is measured again") from error


def seen(scores: Scores) -> list[Seen]:
    """The models of a cell, as `points` and `comparisons` take them."""
    return [
        Seen(one.where, one.seed, {(of.metric, of.condition): _pictures(of.values) for of in one.measured})
        for one in scores.models
    ]


def read(folder: Path, asked: Mapping[str, Asked]) -> tuple[list[Seen], list[RemovalRun]] | None:
    """What the cell of `folder` found, of the removals in `asked` alone; `None` where it has no scores, or others.

    Raises `InputError` for a damaged file.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    scores = load(file)
    if not all(one.holds(scores.asked.get(name), str(file)) for name, one in asked.items()):
        return None
    wanted = {CLEAN, NONE, *asked}
    found = [one for one in seen(scores) if one.where.removal in wanted]
    return found, [run for run in scores.runs if run.removal in wanted]


def _pictures(values: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, int], float]:
    return {(prompt, int(index)): value for prompt, of in values.items() for index, value in of.items()}
