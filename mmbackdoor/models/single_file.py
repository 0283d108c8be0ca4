"""One-file checkpoints in the original Stable Diffusion layout, read offline through configs and written back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from mmbackdoor.models.architectures import ARCHITECTURES, Architecture, config_folder, tokenizers
from mmbackdoor.models.folder import INDEX, check_finite, quiet, reading
from mmbackdoor.models.weight_files import WEIGHTS, read_header, rewrite
from mmbackdoor.types import InputError

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
_TEXT_WIDTHS: dict[int, Architecture] = {768: "sd15", 1024: "sd21_v", 2048: "sdxl"}


def only_file(place: str) -> str:
    """`place`; but where it is a folder with one safetensors file and no pipeline, as a removal writes it from a
    one-file checkpoint, that file."""
    folder = Path(place)
    if not folder.is_dir() or (folder / INDEX).is_file():
        return place
    files = [file for file in folder.iterdir() if file.suffix in WEIGHTS]
    return str(files[0]) if len(files) == 1 else place


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint file and the folder of diffusers configs that describes it (packaged ones lack tokenizers)."""

    path: Path
    config: Path
    architecture: Architecture | None
    original_config: Mapping[str, Any] | None

    def load(self, dtype: torch.dtype) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """The stock pipeline in `dtype` without safety checker. Raises `InputError`."""
        index = json.loads((self.config / INDEX).read_text())
        kind = StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline
        parts: dict[str, Any] = dict(tokenizers(self.architecture)) if self.architecture else {}
        if kind is StableDiffusionPipeline:
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        else:
            parts["add_watermarker"] = False
        if self.original_config is not None:
            parts["scheduler"] = self._scheduler(index)
        with quiet(), reading(self.path):
            pipe = kind.from_single_file(
                str(self.path), config=str(self.config), torch_dtype=dtype, local_files_only=True, **parts
            )
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                # Parts whose weights the file lacks may be left without storage.
                if any(value.is_meta for value in part.state_dict().values()):
                    raise InputError(f"{str(self.path)!r} lacks weights of the {name}; give a whole checkpoint")
                check_finite(part, str(self.path))
        return pipe

    def _scheduler(self, index: Mapping[str, Any]) -> diffusers.SchedulerMixin:
        """The config folder's scheduler with the noise schedule and prediction type of the original YAML."""
        parameters = self.original_config["model"]["params"]
        kind = getattr(diffusers, index["scheduler"][1])
        settings = json.loads((self.config / "scheduler" / "scheduler_config.json").read_text())
        velocity = parameters.get("parameterization") == "v"
        settings["prediction_type"] = "v_prediction" if velocity else "epsilon"
        renamed = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
        for key, name in renamed.items():
            settings[name] = parameters.get(key, settings[name])
        return kind.from_config(settings)

    def stored_names(self, unet: UNet2DConditionModel) -> dict[str, str]:
        """Name in the UNet -> name in the file, for every UNet tensor. Raises `InputError` where one is missing."""
        # Converting placeholders, and looking which one arrived where, gives the renaming that the weights underwent.
        placeholders = {name: torch.empty(0, device="meta") for name in self.names()}
        origin = {id(value): name for name, value in placeholders.items()}
        with quiet(), reading(self.path):
            converted = convert_ldm_unet_checkpoint(dict(placeholders), dict(unet.config))
        stored = {name: origin[id(value)] for name, value in converted.items()}
        missing = [name for name in unet.state_dict() if name not in stored]
        if missing:
            raise InputError(
                f"{str(self.path)!r} lacks the UNet tensor {missing[0]!r}; is the config of another model?"
            )
        return stored

    def names(self) -> list[str]:
        """Of the tensors in the file, without averaged copies."""
        return [name for name in _shapes(self.path) if not name.startswith(EMA_PREFIX)]

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> str:
        """Write the file with `tensors` (by their names in it) into `folder`; return its name. Never writes pickles.

        Averaged copies of the UNet (`model_ema.`) are left out: they still hold the old weights, and by default nothing
        reads them.
        """
        name = self.path.stem + ".safetensors"
        if self.path.suffix in WEIGHTS:
            rewrite(self.path, folder / name, tensors, lambda key: not key.startswith(EMA_PREFIX))
            return name
        state = {key: value for key, value in _unpickle(self.path).items() if not key.startswith(EMA_PREFIX)}
        state |= {key: value.detach().to("cpu", state[key].dtype) for key, value in tensors.items()}
        save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})
        return name


def find_single_file(
    path: Path, config: str | Path | None, original_config: str | Path | None, allow_pt_weights: bool
) -> SingleFile:
    """Check `path` and find its configs: `config` is a folder or a packaged name; else the text's width decides."""
    if path.suffix not in WEIGHTS and not allow_pt_weights:
        raise InputError(
            f"{str(path)!r} is pickled, which can run code when read; convert it to .safetensors, or pass "
            "--allow_pt_weights to read it as plain tensors"
        )
    width = _text_width(path)
    original = None if original_config is None else _read_yaml(Path(original_config))
    if config is not None and str(config) not in ARCHITECTURES:
        folder = Path(config)
        if not (folder / INDEX).is_file():
            raise InputError(
                f"the config {str(config)!r} is neither a folder with {INDEX} nor one of {', '.join(ARCHITECTURES)}"
            )
        return SingleFile(path, folder, None, original)
    if config is None:
        if width not in _TEXT_WIDTHS:
            raise InputError(
                f"{str(path)!r} attends to text of width {width}, which no packaged config has; "
                "pass --pipeline_config FOLDER"
            )
        if width == 1024 and original is None:
            raise InputError(
                f"{str(path)!r} is a Stable Diffusion 2 file, which does not say what it predicts; pass "
                "--pipeline_config sd21_v (velocity, 768 pixels) or --pipeline_config sd21_base (noise, 512 pixels)"
            )
    name = next(known for known in ARCHITECTURES if known == (config or _TEXT_WIDTHS[width]))
    return SingleFile(path, config_folder(name), name, original)


def _text_width(path: Path) -> int:
    """Width of the text that the file's UNet attends to. Raises `InputError` where it has no such UNet."""
    shapes = _shapes(path)
    widths = {
        shape[1]
        for name, shape in shapes.items()
        if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight")
    }
    if len(widths) == 1:
        return widths.pop()
    if any(".lora_" in name or "lora_down" in name for name in shapes):
        raise InputError(f"{str(path)!r} is a LoRA file; give its base model first and the file with --lora")
    raise InputError(
        f"{str(path)!r} holds no Stable Diffusion UNet with cross-attention to text "
        f"(no {UNET_PREFIX}*attn2.to_k.weight); give a whole checkpoint"
    )


def _shapes(path: Path) -> dict[str, list[int]]:
    if path.suffix in WEIGHTS:
        return {name: entry["shape"] for name, entry in read_header(path).items() if name != "__metadata__"}
    return {name: list(value.shape) for name, value in _unpickle(path).items()}


def _unpickle(path: Path) -> dict[str, Tensor]:
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{str(path)!r} holds no tensors")
    return state


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
        content["model"]["params"].get("parameterization")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{str(path)!r} is no Stable Diffusion config (YAML with model.params)") from error
    return content
