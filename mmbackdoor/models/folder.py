"""A diffusers pipeline folder: found locally or on the hub, checked, loaded by parts, copied with new UNet weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mmbackdoor.models.hub import download
from mmbackdoor.models.text_layout import TEXT_ENCODERS, name_in_folder
from mmbackdoor.models.weight_files import PICKLED, WEIGHTS, check_inside, rewrite, tensor_names
from mmbackdoor.types import InputError

INDEX = "model_index.json"
MODELS: dict[str, type] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, RecursionError,
    SingleFileComponentError, UnpicklingError,
)  # fmt: skip
BESIDE = (".json", ".txt", ".model", ".md")
"""Kinds of files that are copied beside the weights: configs, tokenizers, licences, cards."""


@dataclass(frozen=True)
class PipelineFolder:
    """A local folder with `model_index.json`. `variant` as in diffusers (`fp16`); parts without it use plain files."""

    path: Path
    index: dict[str, Any]
    variant: str | None
    allow_pt_weights: bool

    @property
    def is_xl(self) -> bool:
        return "text_encoder_2" in self.index

    def parts(self) -> list[str]:
        """Names of the components that have a folder."""
        named = [name for name, value in self.index.items() if isinstance(value, list) and value[0]]
        return [name for name in named if (self.path / name).is_dir()]

    def weight_files(self, part: str) -> list[Path]:
        """The files of `part`'s weights: the variant's, else the plain ones; safetensors, else (if allowed) pickled.

        Raises `InputError` where there are none, or only pickled ones that were not allowed.
        """
        folder = self.path / part
        variants = [self.variant, None] if self.variant else [None]
        for suffixes in (WEIGHTS, PICKLED):
            for variant in variants:
                files = _weights_of(folder, suffixes, variant)
                if files and suffixes == PICKLED and not self.allow_pt_weights:
                    raise InputError(
                        f"{str(folder)!r} holds pickled weights only ({files[0].name}), which can run code when read; "
                        "convert them to safetensors, or pass --allow_pt_weights to read them as plain tensors"
                    )
                if files:
                    return files
        others = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHTS)
        if others:
            raise InputError(
                f"{str(folder)!r} has no weights under the plain name, only {others[0]!r}; pass the --variant it names"
            )
        raise InputError(f"{str(folder)!r} holds no weights; is the download complete?")

    def copied(self) -> list[str]:
        """The parts whose weights `copy` takes along; it does not load them all (a safety checker, for instance)."""
        return [name for name in self.parts() if name != "feature_extractor" and _has_weights(self.path / name)]

    def beside(self, part: str = "") -> list[Path]:
        """The files that `copy` takes along beside the weights, of the folder itself or of one part."""
        found = [file for file in sorted((self.path / part).iterdir()) if file.is_file() and ".index" not in file.name]
        named = [file for file in found if file.name.split(".")[0].upper() in ("LICENSE", "LICENCE", "NOTICE")]
        return [file for file in found if file.suffix in BESIDE or file in named]

    def check_copied(self) -> None:
        """Raises `InputError` where `copy` could not read the weights of a part, or would follow a link out of the
        folder."""
        for part in ["", *self.parts()]:
            check_inside(self.beside(part), self.path)
        for part in self.copied():
            for file in self.weight_files(part):
                if file.suffix in WEIGHTS:
                    tensor_names(file)

    def load(self, dtype: torch.dtype) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """The pipeline in `dtype`, of the stock text-to-image class, without safety checker. Raises `InputError`."""
        parts: dict[str, Any] = {"unet": self.model("unet", dtype), "vae": self.model("vae", dtype)}
        for suffix in ["", "_2"] if self.is_xl else [""]:
            parts["text_encoder" + suffix] = self.model("text_encoder" + suffix, dtype)
            parts["tokenizer" + suffix] = self._tokenizer("tokenizer" + suffix)
            self._check_vocabulary(parts, suffix)
        parts["scheduler"] = self._scheduler()
        return assemble(parts, self.index)

    def model(self, part: str, dtype: torch.dtype) -> nn.Module:
        """One part with weights, in evaluation mode. Raises `InputError`."""
        class_name = _class_name(self.index, part, self.path)
        if class_name not in MODELS:
            raise InputError(
                f"{str(self.path)!r} has a {part} of class {class_name!r}, but only {', '.join(MODELS)} are supported"
            )
        files = self.weight_files(part)
        for file in files:
            if file.suffix in WEIGHTS:
                tensor_names(file)
        self._check_plain(part)
        chosen = self.variant if self.variant and f".{self.variant}" in files[0].name else None
        folder, safe = self.path / part, files[0].suffix in WEIGHTS
        named = {"variant": chosen, "use_safetensors": safe, "local_files_only": True, "output_loading_info": True}
        with quiet(), reading(folder):
            if class_name.startswith("CLIP"):
                # Its config.json may name another implementation, even one that is to be fetched from the hub.
                named["attn_implementation"] = "sdpa"
                model, report = MODELS[class_name].from_pretrained(folder, dtype=dtype, **named)
            else:
                model, report = MODELS[class_name].from_pretrained(folder, torch_dtype=dtype, **named)
        missing, mismatched = sorted(report["missing_keys"]), list(report.get("mismatched_keys") or ())
        if missing or mismatched:
            raise InputError(
                f"the weights in {str(folder)!r} do not fit its config.json: {str((missing + mismatched)[0])!r} is "
                "missing or has another shape; download them again"
            )
        check_finite(model, str(folder))
        return model

    def _check_plain(self, part: str) -> None:
        """Raises `InputError` where libraries would load something else than the weights, without saying so."""
        folder = self.path / part
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{str(folder)!r} holds an adapter beside its weights (adapter_config.json); merge it into them first, or "
                "take it away and give it as --lora"
            )
        with reading(folder):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and "quantization_config" in config:
            raise InputError(f"{str(folder)!r} is quantized (quantization_config); give the weights as they were before")

    def _tokenizer(self, part: str) -> CLIPTokenizer:
        folder = self.path / part
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise InputError(f"{str(folder)!r} holds no tokenizer (vocab.json and merges.txt, or tokenizer.json)")
        with quiet(), reading(folder):
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def _check_vocabulary(self, parts: Mapping[str, Any], suffix: str) -> None:
        known, config = len(parts["tokenizer" + suffix]), parts["text_encoder" + suffix].config
        if known > config.vocab_size:
            raise InputError(
                f"the tokenizer in {str(self.path / ('tokenizer' + suffix))!r} has {known} tokens, its text encoder "
                f"knows {config.vocab_size}: they do not belong together; download the model again"
            )
        longest = parts["tokenizer" + suffix].model_max_length
        # A huge number stands for "not said".
        if config.max_position_embeddings < longest < 10**9:
            raise InputError(
                f"the tokenizer in {str(self.path / ('tokenizer' + suffix))!r} gives {longest} tokens, its text encoder "
                f"reads {config.max_position_embeddings}: they do not belong together; download the model again"
            )

    def _scheduler(self) -> diffusers.SchedulerMixin:
        folder = self.path / "scheduler"
        kind = getattr(diffusers, _class_name(self.index, "scheduler", self.path), None)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
            name = self.index["scheduler"][1]
            raise InputError(f"{str(self.path)!r} names a scheduler {name!r} that diffusers does not have")
        with quiet(), reading(folder):
            return kind.from_pretrained(folder, local_files_only=True)

    def copy(self, target: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy what was loaded and the small files beside it, with `tensors[part]` in the weights of that part.

        Everything else stays behind: other variants and formats of the weights would still hold the old ones, and code
        may do anything. Pickled weights are converted.
        """
        for file in self.beside():
            if file.stat().st_size < 1 << 20:
                shutil.copyfile(file, target / file.name)
        with_weights = self.copied()
        for part in self.parts():
            (target / part).mkdir()
            for file in self.beside(part):
                shutil.copyfile(file, target / part / file.name)
            if part in with_weights:
                self._copy_weights(part, target / part, tensors.get(part, {}))

    def _copy_weights(self, part: str, target: Path, tensors: Mapping[str, Tensor]) -> None:
        files = self.weight_files(part)
        left = dict(tensors)
        if files[0].suffix in PICKLED:
            _convert(files, target, left)
            return
        for file in files:
            names = set(tensor_names(file))
            stored = {name_in_folder(name, names) if part in TEXT_ENCODERS else name: name for name in left}
            here = {place: left.pop(name) for place, name in stored.items() if place in names}
            rewrite(file, target / file.name, here)
        if len(files) > 1:
            index = _index_of(self.path / part, WEIGHTS, {file.name for file in files})
            shutil.copyfile(index, target / index.name)
        if left:
            raise InputError(
                f"{str(self.path / part)!r} stores its weights under old names ({sorted(left)[0]!r} is not there); "
                "save it anew with diffusers first"
            )


def find_folder(name: str, revision: str | None, variant: str | None, allow_pt_weights: bool) -> PipelineFolder:
    """The pipeline folder at the path `name`, or of the hub id `name`. Raises `InputError`."""
    path = Path(name)
    if not name or not path.is_dir():
        path = download(name, revision, variant, allow_pt_weights)
    file = path / INDEX
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is no diffusers pipeline folder: {INDEX} is not there or broken") from error
    if not isinstance(index, dict):
        raise InputError(f"{str(file)!r} is no pipeline index")
    if _class_name(index, "unet", path) != "UNet2DConditionModel":
        raise InputError(
            f"{str(path)!r} ({index.get('_class_name')}) has no UNet with cross-attention to text; "
            "give a Stable-Diffusion-like text-to-image model"
        )
    return PipelineFolder(path, index, variant, allow_pt_weights)


def assemble(parts: Mapping[str, Any], index: Mapping[str, Any]) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The stock text-to-image pipeline of `parts`, without safety checker; evaluation must see every picture."""
    with quiet():
        if "text_encoder_2" in parts:
            zeros = bool(index.get("force_zeros_for_empty_prompt", True))
            return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **unchecked)


def check_finite(model: nn.Module, place: str) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(
                f"the weights in {place!r} hold NaN or infinite values ({name}); download or export them again"
            )


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turns what libraries raise at unreadable files into one sentence."""
    try:
        yield
    except LOAD_ERRORS as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"{str(place)!r} cannot be loaded ({reason})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of the libraries while weights are read; their settings come back afterwards."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    bars = [logger.is_progress_bar_enabled() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        for logger, level, shown in zip(loggers, before, bars, strict=True):
            logger.set_verbosity(level)
            if shown:
                logger.enable_progress_bar()


def _class_name(index: Mapping[str, Any], part: str, path: Path) -> str:
    value = index.get(part)
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], str):
        raise InputError(
            f"{str(path)!r} has no {part} (see its {INDEX}); give a Stable-Diffusion-like text-to-image model"
        )
    return value[1]


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in WEIGHTS + PICKLED for file in folder.iterdir())


def _stems(variant: str | None) -> tuple[str, ...]:
    end = f".{variant}" if variant else ""
    return tuple(stem + end for stem in ("diffusion_pytorch_model", "model", "pytorch_model"))


def _weights_of(folder: Path, suffixes: tuple[str, ...], variant: str | None) -> list[Path]:
    """The whole file, or the shards that an index names, in order."""
    for stem in _stems(variant):
        for suffix in suffixes:
            if (folder / (stem + suffix)).is_file():
                return [folder / (stem + suffix)]
    for index in sorted(folder.glob("*.index*.json")):
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{str(index)!r} is no readable index of weights") from error
        inside = all(isinstance(name, str) and Path(name).name == name for name in names)
        if not inside or not all((folder / name).is_file() for name in names):
            raise InputError(f"{str(index)!r} names weight files that are not there; is the download complete?")
        if all(Path(name).suffix in suffixes and (f".{variant}" in name if variant else True) for name in names):
            return [folder / name for name in names]
    return []


def _index_of(folder: Path, suffixes: tuple[str, ...], names: set[str]) -> Path:
    for index in sorted(folder.glob("*.index*.json")):
        if set(json.loads(index.read_text())["weight_map"].values()) == names:
            return index
    raise InputError(f"{str(folder)!r} has shards of weights but no index of them")


def _convert(files: list[Path], target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Pickled weights as one safetensors file, the names and dtypes kept."""
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(torch.load(file, map_location="cpu", weights_only=True))
    for name, value in tensors.items():
        place = name if name in state else name_in_folder(name, state)
        state[place] = value.detach().to("cpu", state[place].dtype)
    stem = "diffusion_pytorch_model" if files[0].name.startswith("diffusion") else "model"
    variant = files[0].name.split(".")[1:-1] if len(files) == 1 else []
    name = ".".join([stem, *variant, "safetensors"])
    save_file({key: value.clone().contiguous() for key, value in state.items()}, target / name, {"format": "pt"})
