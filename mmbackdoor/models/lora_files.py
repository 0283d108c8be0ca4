"""LoRA files, diffusers' and kohya's, as the thing to be cleaned: loaded as adapters, written under their own names."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmbackdoor.models.folder import INDEX, quiet, reading
from mmbackdoor.models.lora import ADAPTER
from mmbackdoor.models.weight_files import WEIGHTS, read_header, tensor_names
from mmbackdoor.types import InputError

FILE_NAME = "pytorch_lora_weights.safetensors"
_SCALES = (".alpha",)
_FACTORS = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "lora_linear_layer.")


def find_lora(path: str | Path) -> Path:
    """The LoRA file at `path`, or `pytorch_lora_weights.safetensors` in the folder `path`. Raises `InputError`."""
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise InputError(f"the LoRA {str(path)!r} is no file, nor a folder with {FILE_NAME}; check the path")
    if file.suffix not in WEIGHTS:
        raise InputError(f"the LoRA {str(path)!r} is pickled, which can run code when read; convert it to .safetensors")
    return file


def is_lora(path: str | Path) -> bool:
    """Whether `path` is a LoRA, and no whole model: a file with low-rank factors, or a folder with such a file by the
    name `pytorch_lora_weights.safetensors`. Raises `InputError` for a safetensors file that cannot be read."""
    file = Path(path)
    if file.is_dir() and not (file / INDEX).is_file():
        file = file / FILE_NAME
    if not file.is_file() or file.suffix not in WEIGHTS:
        return False
    return any(part in name for name in tensor_names(file) for part in _FACTORS)


def load_lora(
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, file: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Put the LoRA on `pipe` (which must be float32) at strength 1; return name in the UNet -> name in the file, and
    the same for text encoders, whose names have the encoder's before them.

    Raises `InputError` where the file is no LoRA, holds other kinds of tensors, or does not fit the model.
    """
    header = read_header(file)
    metadata = header.pop("__metadata__", None)
    factors = [name for name in header if any(part in name for part in _FACTORS)]
    others = [name for name in header if name not in factors and not name.endswith(_SCALES)]
    if not factors or others:
        what = f"the tensor {others[0]!r}" if others else "no low-rank factors"
        raise InputError(f"{str(file)!r} holds {what}; only plain LoRA files of diffusers or kohya are supported")
    with reading(file):
        tensors = load_file(file)
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{str(file)!r} holds NaN or infinite values ({name!r})")
    # Factors filled with their number are loaded in place of the real ones: where one arrives, that factor belongs.
    numbered = {name: value.float() for name, value in tensors.items()}
    numbered |= {name: torch.full_like(numbered[name], number) for number, name in enumerate(factors, start=1)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(numbered, Path(folder) / FILE_NAME, metadata)
        with quiet(), reading(file):
            pipe.load_lora_weights(folder, weight_name=FILE_NAME, adapter_name=ADAPTER, local_files_only=True)
    placed: set[str] = set()
    stored = _place(pipe.unet, factors, tensors, placed, file)
    in_text = {}
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            found = _place(part, factors, tensors, placed, file)
            in_text |= {f"{name}.{factor}": place for factor, place in found.items()}
    left = [name for name in factors if name not in placed]
    if left or not stored:
        what = f"holds {left[0]!r}, for which this model has no place" if left else "changes no UNet layer"
        raise InputError(f"the LoRA {str(file)!r} {what}; is it made for another base model?")
    return stored, in_text


def _place(
    module: nn.Module, factors: list[str], tensors: dict[str, Tensor], placed: set[str], file: Path
) -> dict[str, str]:
    """Fill in the real factors; return name in the module -> name in the file."""
    stored = {}
    for name, parameter in module.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        number = int(parameter.detach().flatten()[0])
        if not (parameter == number).all() or not 1 <= number <= len(factors) or factors[number - 1] in placed:
            raise InputError(
                f"the LoRA {str(file)!r} does not fit this model at {name!r}; is it made for another base model?"
            )
        factor = factors[number - 1]
        value = tensors[factor]
        if value.shape != parameter.shape:
            raise InputError(
                f"{factor!r} in {str(file)!r} has the shape {list(value.shape)}, not {list(parameter.shape)}"
            )
        parameter.data = value.to(parameter.dtype).clone()
        placed.add(factor)
        stored[name] = factor
    return stored
