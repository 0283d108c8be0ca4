"""Checkpoints of training: safetensors for tensors, JSON for counters. Nothing is pickled.

The learning rate and all randomness are functions of the step, so a checkpoint is the trained tensors, the moments of
the optimiser, the moving average and one number. It is written aside and renamed: it is complete, or not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmbackdoor.results.run import CONTINUABLE, NEUTRAL
from mmbackdoor.train.optim import Ema
from mmbackdoor.types import InputError

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; `step` steps are done."""

    folder: Path
    step: int


def digest(config: Mapping[str, Any]) -> str:
    """Hash of what decides the outcome of `config`, the settings of a run: not where it writes, nor that it resumes,
    nor what may be changed to go on (see `mmbackdoor.results.run`)."""
    return hashlib.sha256(json.dumps(_deciding(config), sort_keys=True, default=str).encode()).hexdigest()


def _deciding(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {key: _deciding(value) for key, value in values.items() if key not in NEUTRAL | CONTINUABLE}


def find(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and (folder / "state.json").is_file():
            found.append(Checkpoint(folder, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def resolve(output_dir: Path, resume_from_checkpoint: str | None) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint {PATH,latest,auto}` means, or `None` to start at the beginning.

    Raises `InputError` for `latest` where there is none, and for a path that is no checkpoint.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint in ("latest", "auto"):
        found = find(output_dir)
        if found:
            return found[-1]
        if resume_from_checkpoint == "auto":
            return None
        raise InputError(
            f"--resume_from_checkpoint latest: there is no checkpoint in {str(output_dir)!r}; "
            "'auto' resumes if there is one and else starts at the beginning"
        )
    folder = Path(resume_from_checkpoint)
    if not (folder / "state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {resume_from_checkpoint!r} is no checkpoint; give its folder")
    return Checkpoint(folder, int(_state(folder)["step"]))


def save(
    output_dir: Path,
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config_sha256: str,
    ema: Ema | None = None,
    total_limit: int | None = None,
) -> Checkpoint:
    """Write `output_dir/checkpoint-STEP`, then remove the oldest beyond `total_limit`. Called by rank 0 alone."""
    final = output_dir / f"checkpoint-{step}"
    part = output_dir / f".checkpoint-{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}, part / "trained.safetensors")
    names = list(parameters)
    moments, counters = {}, {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.ndim:
                moments[f"{names[index]}|{key}"] = value.detach().cpu().contiguous()
            else:
                counters[f"{names[index]}|{key}"] = float(value)
    save_file(moments, part / "optimizer.safetensors")
    if ema is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in ema.tensors.items()}, part / "ema.safetensors")
    state = {"schema": SCHEMA, "step": step, "config_sha256": config_sha256, "optimizer_counters": counters}
    (part / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    if total_limit is not None:
        for old in find(output_dir)[:-total_limit]:
            shutil.rmtree(old.folder, ignore_errors=True)
    return Checkpoint(final, step)


def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config_sha256: str,
    ema: Ema | None = None,
) -> int:
    """Put a checkpoint into live parameters, optimiser and moving average; returns the number of steps done.

    Raises `InputError` where the checkpoint belongs to another configuration or to other tensors.
    """
    state = _state(checkpoint.folder)
    if state["config_sha256"] != config_sha256:
        raise InputError(
            f"checkpoint {str(checkpoint.folder)!r} was written with another configuration; "
            "resume with the configuration in the run's config.yaml, or take another --output_dir"
        )
    trained = _tensors(checkpoint.folder / "trained.safetensors")
    if trained.keys() != parameters.keys() or any(
        trained[name].shape != parameter.shape for name, parameter in parameters.items()
    ):
        raise InputError(f"checkpoint {str(checkpoint.folder)!r} holds other tensors than this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    content = optimizer.state_dict()
    moments = _tensors(checkpoint.folder / "optimizer.safetensors")
    values: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    counters = {key: torch.tensor(value) for key, value in state["optimizer_counters"].items()}
    for key, value in (counters | moments).items():
        name, _, kind = key.rpartition("|")
        values[name][kind] = value
    content["state"] = {index: values[name] for index, name in enumerate(parameters) if values[name]}
    optimizer.load_state_dict(content)
    if ema is not None:
        for name, tensor in _tensors(checkpoint.folder / "ema.safetensors").items():
            ema.tensors[name].copy_(tensor)
    return int(state["step"])


def _state(folder: Path) -> dict:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {str(folder)!r} cannot be read ({error}); resume from an older one") from error


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint file {str(file)!r} cannot be read ({error}); resume from an older one") from error
