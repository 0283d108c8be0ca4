"""transformers `CLIPModel` and `SiglipModel` folders: read into open_clip's network, written back in their own form.

Nothing is computed on the way: embeddings agree up to rounding, and what was not trained comes back bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPConfig, SiglipConfig

from mmbackdoor.models.clip_links import links
from mmbackdoor.models.folder import LOAD_ERRORS, quiet
from mmbackdoor.models.weight_files import WEIGHTS, check_inside, rewrite, tensor_names
from mmbackdoor.types import Diverged, InputError

CONFIG = "config.json"
KINDS = {"clip": CLIPConfig, "siglip": SiglipConfig}
BESIDE = (
    CONFIG, "preprocessor_config.json", "processor_config.json", "tokenizer*", "vocab*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json", "README.md", "LICENSE*",
)  # fmt: skip
ACTIVATIONS = {"quick_gelu": "quick", "gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
RESAMPLING = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class TransformersFolder:
    """A folder of a `CLIPModel` or `SiglipModel`: its configuration and the files of its weights, in order."""

    path: Path
    config: CLIPConfig | SiglipConfig
    files: tuple[Path, ...]

    @property
    def kind(self) -> Literal["clip", "siglip"]:
        return self.config.model_type

    @cached_property
    def model_cfg(self) -> dict[str, Any]:
        """As in `open_clip_config.json`. A SigLIP's vision tower has no name there: see `network`."""
        text, vision = self.config.text_config, self.config.vision_config
        text_cfg = {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": "local-dir",
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": _ratio(text),
            **_norm_and_activation(text, self.path),
        }
        vision_cfg = {"image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.hidden_size}
        if self.kind == "siglip":
            text_cfg |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
            vision_cfg |= {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
            return self._whole(text.projection_size, vision_cfg, text_cfg)
        # transformers pools configurations of before 2023, which say 2, at the highest id, as open_clip's default does.
        if text.eos_token_id != 2:
            text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
        if text.hidden_act != vision.hidden_act:
            raise InputError(
                f"{str(self.path)!r}: its towers have the activations {text.hidden_act!r} and {vision.hidden_act!r}; "
                "only models with one for both are read"
            )
        vision_cfg |= {
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": _ratio(vision),
            **_norm_and_activation(vision, self.path),
        }
        return self._whole(self.config.projection_dim, vision_cfg, text_cfg)

    def _whole(self, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any]) -> dict[str, Any]:
        quick = {"quick_gelu": True} if self.config.text_config.hidden_act == "quick_gelu" else {}
        return {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **quick}

    @cached_property
    def preprocess_cfg(self) -> dict[str, Any]:
        """open_clip's words for `preprocessor_config.json`. Raises InputError for what they cannot say."""
        size = self.config.vision_config.image_size
        squash = self.kind == "siglip"
        defaults = ((0.5,) * 3, (0.5,) * 3) if squash else (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        found = _processor(self.path)
        wanted = found.get("size", size)
        edges = {wanted} if isinstance(wanted, int) else set(wanted.values())
        crop = found.get("crop_size", size) if found.get("do_center_crop", not squash) else size
        edges |= {crop} if isinstance(crop, int) else set(crop.values())
        resample = found.get("resample", 3)
        if edges != {size} or resample not in RESAMPLING:
            raise InputError(
                f"{str(self.path)!r}: its preprocessing (size {wanted}, crop {crop}, resample {resample}) is not the "
                f"model's {size} pixels by bilinear or bicubic resizing; set these in its preprocessor_config.json"
            )
        whole = isinstance(wanted, dict) and "height" in wanted
        return {
            "size": (size, size),
            "mode": "RGB",
            "mean": tuple(found.get("image_mean", defaults[0])),
            "std": tuple(found.get("image_std", defaults[1])),
            "interpolation": RESAMPLING[resample],
            "resize_mode": "squash" if whole or ("size" not in found and squash) else "shortest",
            "fill_color": 0,
        }

    def network(self) -> nn.Module:
        """open_clip's network with the weights of the folder, fp32, on the CPU, in evaluation mode.

        A SigLIP's vision tower is timm's, built by its sizes: open_clip names only some, most with another activation.
        """
        cfg = self.model_cfg
        if self.kind == "clip":
            network = open_clip.CLIP(**cfg, output_dict=True)
        else:
            network = open_clip.CustomTextCLIP(**cfg, init_logit_bias=-10.0, output_dict=True)
            network.visual.trunk = self._siglip_trunk()
        network.visual.preprocess_cfg = dict(self.preprocess_cfg)
        stored = self._stored()
        state = network.state_dict()
        for link in links(self.kind, *self._layers()):
            try:
                values = link.read([stored[name].float() for name in link.theirs], [state[n].shape for n in link.ours])
            except KeyError as error:
                raise InputError(
                    f"the weights in {str(self.path)!r} lack {error.args[0]!r}; take a whole "
                    f"{type(self.config).__name__.removesuffix('Config')}Model, not one of its towers"
                ) from error
            except (ValueError, RuntimeError) as error:
                raise InputError(f"{str(self.path)!r}: {link.theirs[0]!r} does not fit {CONFIG} ({error})") from error
            state |= dict(zip(link.ours, values, strict=True))
        network.load_state_dict(state)
        return network.eval()

    def write(self, network: nn.Module, target: Path) -> None:
        """Write the folder anew into `target` with the weights of `network`, each in the dtype that came in.

        Other formats of the weights stay behind: they would still hold the old ones. Pickled ones are converted.
        """
        for file in _beside(self.path):
            shutil.copyfile(file, target / file.name)
        new = self._renamed(network)
        if self.files[0].suffix not in WEIGHTS:
            state = self._stored()
            state |= {name: value.to(state[name].dtype) for name, value in new.items()}
            if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
                raise Diverged("the weights are not finite in the dtype that came in; lower the learning rate")
            whole = {name: value.clone().contiguous() for name, value in state.items()}
            save_file(whole, target / "model.safetensors", {"format": "pt"})
            return
        for file in self.files:
            here = {name: new[name] for name in tensor_names(file) if name in new}
            rewrite(file, target / file.name, here)
        for index in self.path.glob("model.safetensors.index.json") if len(self.files) > 1 else ():
            shutil.copyfile(index, target / index.name)

    def _renamed(self, network: nn.Module) -> dict[str, Tensor]:
        state = {name: value.detach().cpu() for name, value in network.state_dict().items()}
        shapes = {name: value.shape for name, value in self._stored().items()}
        new: dict[str, Tensor] = {}
        for link in links(self.kind, *self._layers()):
            wanted = [shapes[name] for name in link.theirs]
            new |= dict(zip(link.theirs, link.write([state[name] for name in link.ours], wanted), strict=True))
        return new

    def _stored(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        try:
            for file in self.files:
                safe = file.suffix in WEIGHTS
                state |= load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        except (*LOAD_ERRORS, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the weights {str(file)!r} cannot be read ({reason}); download them again") from error
        return state

    def _siglip_trunk(self) -> nn.Module:
        vision = self.config.vision_config
        trunk = VisionTransformer(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=_ratio(vision),
            class_token=False,
            global_pool="map",
            num_classes=0,
            act_layer={"tanh": "gelu_tanh", "none": "gelu", "quick": "quick_gelu"}[_activation(vision, self.path)],
        )
        for module in trunk.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = vision.layer_norm_eps
        return trunk

    def _layers(self) -> tuple[int, int]:
        return self.config.text_config.num_hidden_layers, self.config.vision_config.num_hidden_layers


def _beside(folder: Path) -> list[Path]:
    return [file for pattern in BESIDE for file in folder.glob(pattern)]


def find_transformers(folder: Path, permitted: Callable[[Path], Path]) -> TransformersFolder | None:
    """The transformers model in `folder`; None where it holds none. `permitted(file)` refuses pickles or returns them.

    Raises InputError: another kind of model, no weights, a damaged configuration, a link out of the folder.
    """
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(folder / CONFIG)!r} is damaged ({error}); take an intact copy") from error
    if kind not in KINDS:
        raise InputError(
            f"{str(folder)!r} is a transformers model of type {kind!r}; only CLIPModel and SiglipModel are read"
        )
    check_inside(_beside(folder), folder)
    try:
        with quiet():
            config = KINDS[kind].from_pretrained(folder, local_files_only=True)
    except LOAD_ERRORS as error:
        raise InputError(f"{str(folder / CONFIG)!r} is damaged ({error}); take an intact copy") from error
    if kind == "siglip" and not config.vision_config.vision_use_head:
        raise InputError(f"{str(folder)!r} has no pooling head (vision_use_head), so it gives no image embedding")
    return TransformersFolder(folder, config, _files(folder, permitted))


def _files(folder: Path, permitted: Callable[[Path], Path]) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{str(index)!r} is no readable index of weights") from error
        if not all(Path(name).name == name and (folder / name).is_file() for name in names):
            raise InputError(f"{str(index)!r} names weight files that are not there; is the download complete?")
        return tuple(folder / name for name in names)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise InputError(f"{str(folder)!r} has no weights: put model.safetensors beside {CONFIG}")
    return tuple(permitted(file) for file in pickled)


def _processor(folder: Path) -> Mapping[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{str(folder / name)!r} is damaged ({error}); take an intact copy") from error
            return content.get("image_processor", content)
    return {}


def _activation(tower: Any, path: Path) -> str:
    if tower.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{str(path)!r}: activation {tower.hidden_act!r} is not supported; only {known} are")
    return ACTIVATIONS[tower.hidden_act]


def _norm_and_activation(tower: Any, path: Path) -> dict[str, Any]:
    activation = _activation(tower, path)
    options: dict[str, Any] = {"act_kwargs": {"approximate": "tanh"}} if activation == "tanh" else {}
    return options | ({"norm_kwargs": {"eps": tower.layer_norm_eps}} if tower.layer_norm_eps != 1e-5 else {})


def _ratio(tower: Any) -> float:
    """What times the width, rounded down, is the width of the MLP."""
    ratio = tower.intermediate_size / tower.hidden_size
    exact = int(tower.hidden_size * ratio) == tower.intermediate_size
    return ratio if exact else (tower.intermediate_size + 0.5) / tower.hidden_size
