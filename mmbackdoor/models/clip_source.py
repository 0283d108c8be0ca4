"""Where a CLIP model comes from: its configuration and weights file, found without unpickling anything."""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError

from mmbackdoor.models.clip_hub import hub_folder
from mmbackdoor.models.clip_transformers import BESIDE, TransformersFolder, find_transformers
from mmbackdoor.types import InputError

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
SAFE_NAMES = (WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLED_NAMES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "pytorch_model.bin", "pytorch_model.pth")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
RECORDS = ("backdoor.json", "removal.json")
HUB = "hf-hub:"


@dataclass(frozen=True)
class ClipSource:
    """`name` is what open_clip calls the architecture (with its prefix), `folder` its local folder if it has one.

    `transformers` is set where the folder is of that form; it then knows its weights itself.
    """

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any] | None
    folder: Path | None
    weights: Path | None
    quick_gelu: bool = False
    transformers: TransformersFolder | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns of random weights whenever it is not the one that loads them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def find_clip(
    model: str, pretrained: str | None, *, allow_pt_weights: bool = False, weights_needed: bool = True
) -> ClipSource:
    """Resolve the name, hub id or folder `model`; see `mmbackdoor.models.clip.load_clip`. Raises InputError."""
    path = model.removeprefix("local-dir:")
    if path != model or Path(path).is_dir():
        return _in_folder(Path(path), model, allow_pt_weights, weights_needed)
    if model.startswith(HUB):
        return _in_folder(download(model, allow_pt_weights), model, allow_pt_weights, weights_needed)
    return _by_name(model, pretrained, allow_pt_weights)


def download(model: str, allow_pt_weights: bool = False) -> Path:
    """The local folder of the hub's model `hf-hub:ID`: its configuration, its weights (pickled ones only where that is
    allowed) and the records of a backdoor or a removal. Raises InputError as `hub_folder` does."""
    pickled = PICKLED_NAMES if allow_pt_weights else ()
    return hub_folder(model.removeprefix(HUB), (CONFIG_NAME, *SAFE_NAMES, *pickled, *BESIDE, *RECORDS))


def _in_folder(folder: Path, said: str, allow_pt_weights: bool, weights_needed: bool) -> ClipSource:
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}: give the path of one with {CONFIG_NAME}.")
    if not (folder / CONFIG_NAME).exists():
        foreign = find_transformers(folder, lambda file: _permitted(file, allow_pt_weights))
        if foreign is not None:
            return ClipSource(said, foreign.model_cfg, foreign.preprocess_cfg, folder, None, transformers=foreign)
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        model_cfg = content["model_cfg"]
        model_cfg["embed_dim"], model_cfg["vision_cfg"], model_cfg["text_cfg"]
    except FileNotFoundError as error:
        raise InputError(f"{said!r} has no {CONFIG_NAME}: give a folder of open_clip or transformers.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{said!r}: its {CONFIG_NAME} is damaged ({error!r}): take an intact copy.") from error
    weights = next((folder / name for name in SAFE_NAMES if (folder / name).is_file()), None)
    if weights is None:
        pickled = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
        if pickled:
            weights = _permitted(pickled[0], allow_pt_weights)
        elif weights_needed:
            raise InputError(f"{said!r} has no weights: put {WEIGHTS_NAME} beside {CONFIG_NAME}.")
    return ClipSource(f"local-dir:{folder}", model_cfg, None, folder, weights)


def _by_name(model: str, pretrained: str | None, allow_pt_weights: bool) -> ClipSource:
    model_cfg = open_clip.get_model_config(model)
    if model_cfg is None:
        close = get_close_matches(model, open_clip.list_models(), 3, 0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(
            f"{model!r} is neither a folder nor a model that open_clip knows.{hint} Give the path of a folder with "
            f"{CONFIG_NAME}, or 'hf-hub:OWNER/NAME'."
        )
    if pretrained is None:
        return ClipSource(model, model_cfg, None, None, None)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag:
        if not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise InputError(f"{pretrained!r} is neither a file nor weights known for {model!r} (known: {tags}).")
        weights = _permitted(Path(pretrained), allow_pt_weights)
        return ClipSource(model, model_cfg, None, None, weights)
    repo_id, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repo_id:
        raise InputError(
            f"The weights {pretrained!r} of {model!r} exist only as a pickle at {tag.get('url')}: download the file, "
            "check it, and give its path with --allow_pt_weights."
        )
    names = (*SAFE_NAMES, *([f"{Path(file).stem}.safetensors"] if file else []))
    folder = hub_folder(repo_id, names)
    weights = next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{repo_id!r} has no weights as safetensors: take other weights for {model!r}.")
    # Weights that were trained with QuickGELU are worth little without it, and open_clip only warns.
    quick_gelu = bool(tag.get("quick_gelu")) or model_cfg.get("quick_gelu", False)
    if quick_gelu:
        model_cfg = deepcopy(model_cfg) | {"quick_gelu": True}
    preprocess_cfg = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)}
    return ClipSource(model, model_cfg, preprocess_cfg, None, weights, quick_gelu)


def _permitted(file: Path, allow_pt_weights: bool) -> Path:
    if file.suffix == ".safetensors":
        return file
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise InputError(
                    f"{str(file)!r} is a TorchScript archive, as OpenAI publishes them, which holds code: use the "
                    "weights as safetensors, which --pretrained openai takes from the hub. Or convert it, if you trust "
                    "it: safetensors.torch.save_file(open_clip.load_openai_model(FILE, 'fp32', 'cpu').state_dict(), "
                    "NEW), and give NEW as --pretrained of the -quickgelu model."
                )
    if not allow_pt_weights:
        raise InputError(
            f"{str(file)!r} is a pickle, which can run code when it is read: use safetensors, or allow it with "
            "--allow_pt_weights (tensors alone are then read)."
        )
    return file


def read_weights(network: torch.nn.Module, file: Path) -> None:
    """Read `file` into `network`. Every tensor must be there and fit, else InputError."""
    try:
        with quiet():
            open_clip.load_checkpoint(network, str(file), strict=True, weights_only=True)
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"The weights {str(file)!r} cannot be read or do not fit the model: {reason}") from error
