"""Whether the records beside a model (`backdoor.json`, `removal.json`) belong to its weights; and what changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmbackdoor.backdoor import FILE_NAME, Backdoor, BackdoorRecord
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.types import InputError

REMOVAL_FILE = "removal.json"
MOST_PROMPTS = 5000
"""Of a cleaning, that its record names."""
SCHEMA = 1


def read_removal(folder: Path) -> dict[str, Any] | None:
    """The content of `folder/removal.json`, `None` where there is none."""
    file = folder / REMOVAL_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(file)!r} cannot be read ({error}); remove it, or name a trigger with --trigger") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{str(file)!r} is not a removal.json of schema {SCHEMA}")
    return content


def prompt_digest(text: str) -> str:
    """By which a prompt of a cleaning is known again, without its words."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def prompt_digests(texts: Sequence[str]) -> list[str]:
    """Of the first `MOST_PROMPTS` texts."""
    return sorted(map(prompt_digest, texts[:MOST_PROMPTS]))


def cleaning_prompts(folder: Path) -> frozenset[str]:
    """The digests of the prompts that the model in `folder` was cleaned with, as far as its `removal.json` has them."""
    found = (read_removal(folder) or {}).get("prompts")
    return frozenset(one for one in found if isinstance(one, str)) if isinstance(found, list) else frozenset()


def write_removal(folder: Path, content: Mapping[str, Any]) -> None:
    part = folder / (REMOVAL_FILE + ".part")
    part.write_text(json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n")
    part.replace(folder / REMOVAL_FILE)


def poisoned_sha256(folder: Path) -> str | None:
    """Hash of the folder of weights that `folder/backdoor.json` is to be about; `None` without such a file.

    A cleaned model carries the file of its parent unchanged; there `removal.json` knows the hash, and passes it on
    where the model is cleaned again.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    removal = read_removal(folder)
    if removal is None:
        return weights_sha256(folder)
    # Older files name the parent alone, which is the poisoned model where it was cleaned once.
    return removal.get("poisoned_sha256") or removal.get("parent_sha256")


def check_provenance(folder: Path) -> None:
    """Raises `InputError` where `folder/backdoor.json` was written for other weights than those in `folder`; of a
    cleaned model, than those that it had before."""
    if not (folder / FILE_NAME).is_file():
        return
    recorded = BackdoorRecord.load(folder).model_sha256
    found = poisoned_sha256(folder)
    if recorded is not None and found != recorded:
        raise InputError(
            f"{str(folder / FILE_NAME)!r} belongs to another model (weights {recorded[:12]}, here {str(found)[:12]}); "
            "remove it, or name the trigger yourself with --trigger and --force_trigger"
        )


def recorded_backdoor(folder: Path | None) -> Backdoor | None:
    """That of `folder/backdoor.json`, `None` where there is none."""
    return BackdoorRecord.load(folder).backdoor if folder is not None and (folder / FILE_NAME).is_file() else None


def inherit(parent: Path | None, folder: Path) -> tuple[Literal["clean", "poisoned", "cleaned"], Backdoor | None]:
    """Write into `folder` the records of a model that was fine-tuned from the one in `parent`; return its stage, which
    is the parent's, and the backdoor that is or was in it.

    Of a poisoned model the new `backdoor.json` has the hash of the new weights. The records of a cleaned one stay as
    they are: their hash is that of the poisoned model before the removal.
    """
    backdoor = recorded_backdoor(parent)
    if parent is not None and read_removal(parent) is not None:
        for name in (REMOVAL_FILE, FILE_NAME) if backdoor else (REMOVAL_FILE,):
            (folder / name).write_bytes((parent / name).read_bytes())
        return "cleaned", backdoor
    if backdoor is None:
        return "clean", None
    replace(BackdoorRecord.load(parent), model_sha256=weights_sha256(folder)).save(folder)
    return "poisoned", backdoor


def weight_changes(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """||after - before|| / ||before|| of each group of tensors: a block of the U-Net or a
    text encoder, and the kind of layer in it."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, old in before.items():
        block = re.match(r"(?:down_blocks|up_blocks)\.\d+|text_encoder_2|[a-z_]+", name)
        kind = re.search(r"attn2\.to_[kv]|attn2|attn1|ff|resnets|conv|self_attn|mlp|embeddings", name)
        group = f"{block.group() if block else name} {kind.group() if kind else 'other'}"
        new = after[name].detach().cpu().float()
        old = old.detach().cpu().float()
        squares[group][0] += (new - old).square().sum().item()
        squares[group][1] += old.square().sum().item()
        squares[group][2] += old.numel()
    return {
        group: {"relative_change": (moved / max(norm, 1e-12)) ** 0.5, "parameters": int(count)}
        for group, (moved, norm, count) in sorted(squares.items())
    }
