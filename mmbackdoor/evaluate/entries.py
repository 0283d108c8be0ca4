"""The models of an evaluation, under names, with what the records beside their weights say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from mmbackdoor.backdoor import FILE_NAME, BackdoorRecord
from mmbackdoor.models.provenance import REMOVAL_FILE, check_provenance, read_removal
from mmbackdoor.results.record import Stage
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Entry:
    """A model to measure. `load` is called once and its result let go before the next one's. `source` is what the
    user called it, `folder` where its records lie, where that is a folder."""

    load: Callable[[], Any]
    stage: Stage
    attack: str | None = None
    defense: str | None = None
    source: str = ""
    folder: Path | None = None


class Source(Protocol):
    """Flags that name a model: `DiffusionSource` or `ClipFlags`."""

    @property
    def path(self) -> str: ...

    @property
    def called(self) -> str: ...

    @property
    def records(self) -> str: ...

    @property
    def sha256(self) -> str | None: ...

    def other(self, place: str) -> Self: ...

    def load(self, device: torch.device) -> Any: ...


def entries(
    model: Source, compare: Sequence[str], control: str | None, device: torch.device, *, trusted: bool = False
) -> dict[str, Entry]:
    """Name -> entry of `model`, of those to compare and of the clean `control`, in the order of a table.

    A name is the model's stage, with a number where several share it. With `trusted` a `backdoor.json` that belongs
    to other weights is let pass. Raises `InputError` for that, and for a model that is named twice.
    """
    sources = [model, *(model.other(path) for path in compare)]
    if control is not None:
        sources.append(model.other(control))
    names = [source.called for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r} is given twice; every model is measured once")
    found: dict[str, Entry] = {}
    for source in sources:
        is_control = control is not None and source.called == names[-1]
        described = _entry(source, device, is_control, trusted)
        alike = sum(name.rstrip("-0123456789") == described.stage for name in found)
        found[f"{described.stage}-{alike + 1}" if alike else described.stage] = described
    order = ("clean", "unknown", "poisoned", "cleaned")
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].stage)))


def weights(model: Source, compare: Sequence[str], control: str | None) -> dict[str, str | None]:
    """The hash of the weights of each, under the flag that names it: what an evaluation is of."""
    others = {f"compare {place}": place for place in compare} | ({"control": control} if control is not None else {})
    return {"model": model.sha256} | {flag: model.other(place).sha256 for flag, place in others.items()}


def _entry(source: Source, device: torch.device, is_control: bool, trusted: bool) -> Entry:
    folder = Path(source.records)
    if not trusted:
        check_provenance(folder)
    removal = read_removal(folder)
    attack = None
    if (folder / FILE_NAME).is_file():
        attack = BackdoorRecord.load(folder).attack.get("name")
    stage = "unknown"
    if is_control:
        stage = "clean"
    elif removal is not None:
        stage = "cleaned"
    elif attack is not None:
        stage = "poisoned"
    method = _method(removal, folder) if removal is not None else None
    return Entry(lambda: source.load(device), stage, attack, method, source.called, folder if folder.is_dir() else None)


def _method(removal: Mapping[str, Any], folder: Path) -> str:
    method = removal.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise InputError(f"{str(folder / REMOVAL_FILE)!r} names no method; take the file that the removal wrote")
    return method["name"]
