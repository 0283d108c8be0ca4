"""Text-to-image models from files and back: diffusers folders and hub ids, one-file checkpoints, LoRA files.

What is saved has the form and the dtypes that came in; every tensor that was not declared trained keeps its bytes.
"""

from __future__ import annotations

import functools
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmbackdoor.backdoor import FILE_NAME as BACKDOOR_FILE
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.folder import PipelineFolder, find_folder
from mmbackdoor.models.lora import adapter_parameters, merged_state_dict
from mmbackdoor.models.lora_files import FILE_NAME as LORA_FILE_NAME
from mmbackdoor.models.lora_files import find_lora, load_lora
from mmbackdoor.models.provenance import REMOVAL_FILE
from mmbackdoor.models.single_file import SingleFile, find_single_file
from mmbackdoor.models.text_layout import TEXT_ENCODERS, in_original_layout
from mmbackdoor.models.weight_files import rewrite, weights_sha256
from mmbackdoor.types import InputError

Origin = Literal["folder", "single_file", "lora"]
# The card is among them for its licence.
RECORDS = (BACKDOOR_FILE, REMOVAL_FILE, "README.md")


@dataclass(frozen=True)
class Source:
    """Where a model's weights lie. `stored` maps the names of tensors in the UNet to their names in `path`, and
    `stored_text` those of a LoRA's factors in text encoders (`text_encoder.` before them)."""

    name: str
    origin: Origin
    path: Path
    base: PipelineFolder | SingleFile
    stored: Mapping[str, str] = field(default_factory=dict)
    stored_text: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def sha256(self) -> str:
        """Of what is to be cleaned: the folder's or the file's weights; for a LoRA, the LoRA file's."""
        return weights_sha256(self.path)

    @property
    def records(self) -> Path:
        """The folder where the records of these weights lie: theirs, or that of their one file."""
        return self.path if self.origin == "folder" else self.path.parent


def load(
    pretrained_model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    original_config: str | Path | None = None,
    lora: str | Path | None = None,
    allow_pt_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resolution: int | None = None,
) -> DiffusionModel:
    """Load a Stable-Diffusion-like model from a folder, a hub id or one file: frozen, eval mode, no safety checker.

    One-file models need no network: `config` is a folder of diffusers configs or a packaged name (sd15, sd21_base,
    sd21_v, sdxl), by default the one that fits; `original_config` is the original YAML. With `lora`, the LoRA file on
    that base is what is trained and saved. Raises `InputError`, in one sentence, for what is no text-conditioned UNet.
    """
    name = os.fspath(pretrained_model_name_or_path)
    path = Path(name)
    if path.is_file():
        base: PipelineFolder | SingleFile = find_single_file(path, config, original_config, allow_pt_weights)
    elif config is not None or original_config is not None:
        raise InputError(f"{name!r} is no file; config and original_config describe one-file checkpoints only")
    else:
        base = find_folder(name, revision, variant, allow_pt_weights)
    lora_file = None if lora is None else find_lora(lora)
    if lora_file is None and isinstance(base, PipelineFolder):
        # All of it is written again at the end; that this can be done shall not be found out then.
        base.check_copied()
    pipe = base.load(torch.float32 if lora_file else dtype)
    if lora_file:
        source = Source(f"{name}+{os.fspath(lora)}", "lora", lora_file, base, *load_lora(pipe, lora_file))
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype)
    elif isinstance(base, SingleFile):
        source = Source(name, "single_file", base.path, base, base.stored_names(pipe.unet))
    else:
        source = Source(name, "folder", base.path, base)
    model = DiffusionModel(pipe, source, resolution)
    return model.to(device)


def save(model: DiffusionModel, folder: str | Path, extra: Callable[[Path], None] | None = None) -> Path:
    """Write `model` into `folder` in the form it came in; return the folder, or the file for one-file models and LoRAs.

    `extra(part)` may add files before the folder gets its final name. Raises `InputError` where `folder` is taken.
    """
    target = Path(folder)
    with written_whole(target) as part:
        name = _write(model, part)
        if extra is not None:
            extra(part)
    return target / name if name else target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end, or vanishes with an error."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} exists already and is not empty; give another output folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # What a killed process left: a model is saved by one process alone.
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            shutil.rmtree(left, ignore_errors=True)
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
    """Write the weights into the folder `part`; return the name of the one file, or "" for a pipeline folder."""
    source = model.files
    if source is None:
        model.pipe.save_pretrained(part, safe_serialization=True)
        for name, module in {"unet": model.unet, **model.text_encoders}.items():
            if not adapter_parameters(module):
                continue
            # save_pretrained writes adapters and weights apart, under names that stock code does not load.
            for file in (part / name).glob("adapter_*"):
                file.unlink()
            stem = "diffusion_pytorch_model"
            if name in TEXT_ENCODERS:
                stem = "model"
                module.config.save_pretrained(part / name)
            state = {key: value.contiguous() for key, value in merged_state_dict(module).items()}
            save_file(state, part / name / f"{stem}.safetensors", {"format": "pt"})
        return ""
    if source.origin != "folder":
        for file in (source.records / name for name in RECORDS):
            if file.is_file():
                shutil.copyfile(file, part / file.name)
    if source.origin == "lora":
        parameters = dict(model.unet.named_parameters())
        for name, encoder in model.text_encoders.items():
            parameters |= {f"{name}.{key}": value for key, value in encoder.named_parameters()}
        stored = {**source.stored, **source.stored_text}
        rewrite(source.path, part / LORA_FILE_NAME, {stored[name]: parameters[name] for name in model.trained})
        return LORA_FILE_NAME
    tensors = _by_part(trained_tensors(model))
    if isinstance(source.base, SingleFile):
        stored = {source.stored[name]: value for name, value in tensors.pop("unet", {}).items()}
        for name, values in tensors.items():
            state = merged_state_dict(model.text_encoders[name])
            stored |= in_original_layout(name, values, state, source.base.names())
        return source.base.write(part, stored)
    source.base.copy(part, tensors)
    return ""


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same under the names of their parts, without them before their own."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        part, own = (first, rest) if first in TEXT_ENCODERS else ("unet", name)
        parts.setdefault(part, {})[own] = value
    return parts


def trained_tensors(model: DiffusionModel) -> dict[str, Tensor]:
    """Original name -> value of every weight that was declared trained, named as in `DiffusionModel.trained`; adapters
    are merged into their weights."""
    names = {name.replace(".base_layer.", ".").split(".lora_A.")[0].split(".lora_B.")[0] for name in model.trained}
    state = merged_state_dict(model.unet)
    for part, encoder in model.text_encoders.items():
        if any(name.startswith(f"{part}.") for name in names):
            state |= {f"{part}.{name}": value for name, value in merged_state_dict(encoder).items()}
    stored = sorted(name if name in state else f"{name}.weight" for name in names)
    return {name: state[name] for name in stored}
