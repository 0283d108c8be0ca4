"""Checkpoints of training: safetensors for tensors, JSON for counters. Nothing is pickled.

The learning rate and all randomness are functions of the step, so a checkpoint is the trained tensors, the moments of
the optimiser, the moving average, the order of the data and a few numbers. It is written aside, brought to the disk and
renamed: it is complete, or not there. It holds the hashes of its files, so damage is found before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmbackdoor.config_schema import is_main_process
from mmbackdoor.results.run import CONTINUABLE, NEUTRAL, ORDERING
from mmbackdoor.train.optim import Ema
from mmbackdoor.types import InputError

SCHEMA = 2
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; `step` steps are done."""

    folder: Path
    step: int


def deciding(values: Any) -> Any:
    """What of the settings of a run decides its outcome: not where it writes, nor that it resumes, nor what may be
    changed to go on, nor what the order of the data says (see `mmbackdoor.results.run`)."""
    if not isinstance(values, Mapping):
        return values
    return {key: deciding(value) for key, value in values.items() if key not in NEUTRAL | CONTINUABLE | ORDERING}


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def find(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and (folder / STATE).is_file():
            found.append(Checkpoint(folder, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def resolve(output_dir: Path, resume_from_checkpoint: str | None, verify: bool = True) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint {PATH,latest,auto}` means, or `None` to start at the beginning.

    With `verify`, `latest` and `auto` pass over damaged ones, and say so. Raises `InputError` for `latest` where there
    is none, for a path that is no checkpoint, and where all are damaged.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint not in ("latest", "auto"):
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE).is_file():
            raise InputError(f"--resume_from_checkpoint {resume_from_checkpoint!r} is no checkpoint; give its folder")
        if verify and (reason := damage(folder)):
            raise InputError(f"checkpoint {str(folder)!r} cannot be read ({reason}); resume from an older one")
        return Checkpoint(folder, read_state(folder)["step"])
    found = find(output_dir)
    if not found:
        if resume_from_checkpoint == "auto":
            return None
        raise InputError(
            f"--resume_from_checkpoint latest: there is no checkpoint in {str(output_dir)!r}; "
            "'auto' resumes if there is one and else starts at the beginning"
        )
    for checkpoint in reversed(found):
        reason = damage(checkpoint.folder) if verify else None
        if reason is None:
            return checkpoint
        if is_main_process():
            print(f"checkpoint {str(checkpoint.folder)!r} is damaged ({reason}): trying an older one", file=sys.stderr)
    raise InputError(
        f"all {len(found)} checkpoints in {str(output_dir)!r} are damaged (they cannot be read); "
        "remove them to start at the beginning, or give another one's folder"
    )


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; `None` where every byte is as it was written."""
    try:
        for name, expected in read_state(folder)["files"].items():
            with (folder / Path(name).name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                    return f"{name} is not as it was written"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises `InputError` where they are not as they were written."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        expected = state.pop("sha256")
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}, {SCHEMA} is read")
        if expected != _sha256(state):
            raise ValueError("its content was changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{str(folder / STATE)!r} cannot be read ({type(error).__name__}: {error}); resume from an older checkpoint"
        ) from error
    return state


def save(
    output_dir: Path,
    step: int,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
    total_limit: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write `output_dir/checkpoint-STEP` with the JSON values `facts`, then remove the oldest beyond `total_limit`, and
    those of later steps: they are of a branch that this run left. Called by rank 0 alone."""
    final = output_dir / f"checkpoint-{step}"
    part = output_dir / f".checkpoint-{step}.part"
    # What a killed process left, of whatever step.
    for left in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        files = _write_tensors(part, parameters, optimizer, ema)
        state = {
            "schema": SCHEMA,
            "step": step,
            "optimizer_counters": _counters(parameters, optimizer),
            "files": files,
            **(facts or {}),
        }
        # Through JSON, so that the hash is that of what will be read.
        state = json.loads(json.dumps(state, default=str))
        (part / STATE).write_text(json.dumps(state | {"sha256": _sha256(state)}), encoding="utf-8")
        to_disk([*part.iterdir(), part])
        if final.exists():
            aside = output_dir / f".checkpoint-{step}.old.part"
            shutil.rmtree(aside, ignore_errors=True)
            final.replace(aside)
            part.replace(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            part.replace(final)
        to_disk([output_dir])
    except BaseException:
        # A full disk is often why: what is of no use must not fill it.
        shutil.rmtree(part, ignore_errors=True)
        raise
    found = find(output_dir)
    kept = [old for old in found if old.step <= step][-(total_limit or len(found)) :]
    for old in found:
        if old not in kept:
            shutil.rmtree(old.folder, ignore_errors=True)
    return Checkpoint(final, step)


def _write_tensors(
    folder: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, ema: Ema | None
) -> dict[str, str]:
    names = list(parameters)
    tensors = {
        "trained": dict(parameters),
        "optimizer": {
            f"{names[index]}|{key}": value
            for index, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if torch.is_tensor(value) and value.ndim
        },
    }
    if ema is not None:
        tensors["ema"] = ema.tensors
    digests = {}
    for name, values in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, file)
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _counters(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = list(parameters)
    return {
        f"{names[index]}|{key}": float(value)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if not (torch.is_tensor(value) and value.ndim)
    }


def to_disk(paths: Iterable[Path]) -> None:
    """So that a rename that follows never names what a power cut could still take back."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
) -> int:
    """Put a checkpoint into live parameters, optimiser and moving average; returns the number of steps done.

    Raises `InputError` where the checkpoint holds other tensors. Whether it is of the same configuration is for the
    caller to compare.
    """
    folder = checkpoint.folder
    state = read_state(folder)
    trained = _tensors(folder / "trained.safetensors")
    _check_shapes(folder, trained, parameters)
    values: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for key, value in _tensors(folder / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        _check_shapes(folder, {name: value}, {name: parameters[name]} if name in parameters else {})
        values[name][kind] = value
    for key, number in state["optimizer_counters"].items():
        name, _, kind = key.rpartition("|")
        _check_shapes(folder, {name: torch.tensor(0)}, {name: torch.tensor(0)} if name in parameters else {})
        values[name][kind] = torch.tensor(number)
    averaged = _tensors(folder / "ema.safetensors") if ema is not None else {}
    if ema is not None:
        _check_shapes(folder, averaged, ema.tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
        for name, tensor in averaged.items():
            ema.tensors[name].copy_(tensor)
    content = optimizer.state_dict()
    content["state"] = {index: values[name] for index, name in enumerate(parameters) if values[name]}
    optimizer.load_state_dict(content)
    return int(state["step"])


def _check_shapes(folder: Path, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    if found.keys() != wanted.keys() or any(found[name].shape != tensor.shape for name, tensor in wanted.items()):
        raise InputError(f"checkpoint {str(folder)!r} holds other tensors than this run trains; take another one")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint file {str(file)!r} cannot be read ({error}); resume from an older one") from error
