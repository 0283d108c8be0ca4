"""Text-to-image models from files and back: diffusers folders and hub ids, one-file checkpoints, LoRA files.

What is saved has the form and the dtypes that came in; every tensor that was not declared trained keeps its bytes.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.folder import PipelineFolder, find_folder
from mmbackdoor.models.lora import merged_state_dict
from mmbackdoor.models.weight_files import PICKLED, WEIGHTS, rewrite, weights_sha256
from mmbackdoor.types import InputError

Origin = Literal["folder", "single_file", "lora"]


@dataclass(frozen=True)
class Source:
    """Where a model's weights lie. `stored` maps the names of tensors in the model to their names in the file."""

    name: str
    origin: Origin
    path: Path
    folder: PipelineFolder | None = None
    stored: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def sha256(self) -> str:
        return weights_sha256(self.path)


def load(
    pretrained_model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    allow_pt_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resolution: int | None = None,
) -> DiffusionModel:
    """Load a Stable-Diffusion-like model, frozen and in eval mode, without its safety checker.

    Raises `InputError`, in one sentence, for whatever cannot be loaded or is no text-conditioned UNet.
    """
    name = os.fspath(pretrained_model_name_or_path)
    path = Path(name)
    folder = find_folder(name, revision, variant, allow_pt_weights)
    model = DiffusionModel(folder.load(dtype), Source(name, "folder", folder.path, folder), resolution)
    return model.to(device)


def save(model: DiffusionModel, folder: str | Path, extra: Callable[[Path], None] | None = None) -> Path:
    """Write `model` into `folder` in the form it came in; return the folder, or the file for one-file models and LoRAs.

    `extra(part)` may add files before the folder gets its final name. Raises `InputError` where `folder` is taken.
    """
    target = Path(folder)
    with _written_whole(target) as part:
        name = _write(model, part)
        if extra is not None:
            extra(part)
    return target / name if name else target


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end, or vanishes with an error."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} exists already and is not empty; give another output folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"{str(target)!r} cannot be written ({error.strerror}); give another output folder") from error
    try:
        part.chmod(0o755)
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(model: DiffusionModel, part: Path) -> str:
    source = model.files
    if source is None:
        _write_new(model, part)
        return ""
    source.folder.copy(part, trained_tensors(model))
    return ""


def _write_new(model: DiffusionModel, part: Path) -> None:
    model.pipe.save_pretrained(part, safe_serialization=True)


def trained_tensors(model: DiffusionModel) -> dict[str, Tensor]:
    """Original name -> value of every UNet weight that was declared trained; adapters are merged into their weights."""
    state = merged_state_dict(model.unet)
    names = {name.split(".lora_A.")[0].split(".lora_B.")[0] for name in model.trained}
    return {name: state[name] if name in state else state[f"{name}.weight"] for name in sorted(names)}
