"""The models of an evaluation, under names, with what the records beside their weights say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmbackdoor.backdoor import FILE_NAME, BackdoorRecord
from mmbackdoor.evaluate.suite import Entry
from mmbackdoor.models.provenance import REMOVAL_FILE, check_provenance, read_removal
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.types import InputError


def entries(
    model: DiffusionSource, compare: Sequence[str], control: str | None, device: torch.device, *, trusted: bool = False
) -> dict[str, Entry]:
    """Name -> entry of `model`, of those to compare and of the clean `control`, in the order of a table.

    A name is the model's stage, with a number where several share it. With `trusted` a `backdoor.json` that belongs
    to other weights is let pass. Raises `InputError` for that, and for a model that is named twice.
    """
    sources = [model, *(replace(model, pretrained_model_name_or_path=path) for path in compare)]
    paths = [source.path for source in sources]
    if control is not None:
        sources.append(replace(model, pretrained_model_name_or_path=control))
        paths.append(sources[-1].path)
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path!r} is given twice; every model is measured once")
    found: dict[str, Entry] = {}
    for source in sources:
        is_control = control is not None and source.path == paths[-1]
        described = _entry(source, device, is_control, trusted)
        alike = sum(name.rstrip("-0123456789") == described.stage for name in found)
        found[f"{described.stage}-{alike + 1}" if alike else described.stage] = described
    order = ("clean", "unknown", "poisoned", "cleaned")
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].stage)))


def _entry(source: DiffusionSource, device: torch.device, is_control: bool, trusted: bool) -> Entry:
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
    return Entry(lambda: source.load(device), stage, attack, _method(removal, folder) if removal is not None else None)


def _method(removal: Mapping[str, Any], folder: Path) -> str:
    method = removal.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise InputError(f"{str(folder / REMOVAL_FILE)!r} names no method; take the file that the removal wrote")
    return method["name"]
