"""CLIP models in open_clip's form: load any, build a tiny one, save so that stock open_clip reads it back.

Everything that loads or builds a model returns it in evaluation mode. open_clip itself returns training mode, in which
BatchNorm scores a picture by its neighbours: an attack of rate 1.0 then reads as 0.0.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from mmbackdoor.models.clip_hub import hub_folder
from mmbackdoor.models.clip_source import (
    CONFIG_NAME,
    TOKENIZER_FILES,
    WEIGHTS_NAME,
    ClipSource,
    find_clip,
    quiet,
    read_weights,
)
from mmbackdoor.models.clip_transformers import TransformersFolder
from mmbackdoor.models.vocabulary import byte_token_ids
from mmbackdoor.seeding import derive_seed
from mmbackdoor.types import Diverged, InputError

LOG = logging.getLogger(__name__)
TINY_PREPROCESSING = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SAVED_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass
class ClipModel:
    """An open_clip network with what belongs to it: its tokenizer, its preprocessing and its configuration.

    `model_cfg` and `preprocess_cfg` are those of `open_clip_config.json`. `transformers` is the folder of that form
    that the model came from. `cut_captions` counts the texts that were longer than the context, since it was loaded.
    """

    network: torch.nn.Module
    tokenizer: HFTokenizer | SimpleTokenizer
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    source: str
    transformers: TransformersFolder | None = None
    cut_captions: int = 0

    @property
    def device(self) -> torch.device:
        return self.network.logit_scale.device

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (B, context_length), padded and cut as open_clip does; on the CPU.

        Texts that were cut are counted in `cut_captions`; the first batch with one is warned of.
        """
        ids = self.tokenizer(list(texts))
        cut = self._cut(texts, ids)
        if cut and not self.cut_captions:
            LOG.warning(
                "%d of %d texts are longer than the %d tokens that %s reads: their end is cut off. The count goes on "
                "in silence.", len(cut), len(ids), ids.shape[1], self.source,
            )  # fmt: skip
        self.cut_captions += len(cut)
        return ids

    def _cut(self, texts: Sequence[str], ids: Tensor) -> list[str]:
        """Those of `texts` that have more tokens than `ids` has room for."""
        simple = isinstance(self.tokenizer, SimpleTokenizer)
        # Only a row without padding can have lost something; few have none, so few are read a second time.
        full = ids[:, -2] != (0 if simple else self.tokenizer.tokenizer.pad_token_id)
        suspects = [text for text, one in zip(texts, full.tolist(), strict=True) if one]
        if simple:
            return [text for text in suspects if len(self.tokenizer.encode(text)) + 2 > ids.shape[1]]
        if not suspects:
            return []
        with quiet():
            whole = self.tokenizer.tokenizer([self.tokenizer.clean_fn(text) for text in suspects]).input_ids
        return [text for text, tokens in zip(suspects, whole, strict=True) if len(tokens) > ids.shape[1]]

    def byte_tokens(self) -> tuple[Tensor, int]:
        """The ids of the single-byte tokens, and that of the end of text. Raises InputError where there are none."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return torch.arange(512), self.tokenizer.eot_token_id
        tokenizer = self.tokenizer.tokenizer
        if not isinstance(tokenizer, CLIPTokenizer):
            raise InputError(f"The tokenizer of {self.source!r} has no single-byte tokens: use --random_tokens 0.")
        return byte_token_ids(tokenizer), tokenizer.eos_token_id

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels (B, 3, H, W) of RGB pictures, resized, cropped and normalised for this model; on the CPU."""
        return self.normalise(self.resize_crop(images))

    def resize_crop(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures in this model's size, RGB: the first part of `preprocess`."""
        return resize_crop(images, self.preprocess_cfg)

    def normalise(self, images: Sequence[Image.Image | np.ndarray]) -> Tensor:
        """Pixels (B, 3, H, W) of RGB pictures, or of uint8 (H, W, 3), of one size: the last part of `preprocess`."""
        cfg = PreprocessCfg(**self.preprocess_cfg)
        # The values of open_clip's transform, all at once: small pictures would cost more here than in the network.
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
        return ((pixels - mean) / std).contiguous()


def resize_crop(images: Sequence[Image.Image], preprocess_cfg: dict[str, Any]) -> list[Image.Image]:
    """The pictures in the size of a model with `preprocess_cfg`, RGB, as open_clip resizes and crops them."""
    cfg = PreprocessCfg(**preprocess_cfg)
    height, width = cfg.size if isinstance(cfg.size, (tuple, list)) else (cfg.size, cfg.size)
    if all(image.size == (width, height) and image.mode == "RGB" for image in images):
        return list(images)
    # Without the last two: what makes a tensor of the picture, and what normalises it.
    *steps, _, _ = image_transform_v2(cfg, is_train=False).transforms
    resized = []
    for image in images:
        for step in steps:
            image = step(image)
        resized.append(image)
    return resized


def _network(
    source: ClipSource, device: str | torch.device, logit_init: Mapping[str, float] | None = None
) -> torch.nn.Module:
    with quiet():
        return open_clip.create_model(
            source.name,
            load_weights=False,
            pretrained_text=False,
            device=device,
            force_quick_gelu=source.quick_gelu,
            force_preprocess_cfg=source.preprocess_cfg,
            output_dict=True,
            **(logit_init or {}),
        )


def _tokenizer(text_cfg: dict[str, Any], folder: Path | None) -> HFTokenizer | SimpleTokenizer:
    context_length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=context_length, **options)
    if folder is None or not any(folder.glob("tokenizer*")):
        folder = hub_folder(name, (*TOKENIZER_FILES, "config.json"))
    return HFTokenizer(str(folder), context_length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)


def load_clip(
    model: str,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    *,
    allow_pt_weights: bool = False,
    logit_init: Mapping[str, float] | None = None,
) -> ClipModel:
    """Load a CLIP model, in evaluation mode.

    `model` is a folder with `open_clip_config.json`, or of a transformers `CLIPModel` or `SiglipModel` (`PATH` or
    `local-dir:PATH`), a hub id of either form (`hf-hub:OWNER/NAME`) or a name that open_clip knows; with a name,
    `pretrained` is one of its tags or a weights file, and `None` means random weights. Raises InputError: unknown name
    or tag, missing files, no network (within 10 seconds), pickled weights without `allow_pt_weights`, weights that do
    not fit.

    `logit_init` (`init_logit_scale`, a logarithm, and `init_logit_bias`) gives the network a logit bias, as SigLIP has
    one. Weights that are loaded bring their own scale; where they have no bias, it starts from 0.
    """
    source = find_clip(model, pretrained, allow_pt_weights=allow_pt_weights)
    if source.transformers is not None:
        return _of_transformers(source.transformers, model, device, logit_init)
    network = _network(source, device, logit_init)
    if source.weights is not None:
        read_weights(network, source.weights)
    network.eval()
    tokenizer = _tokenizer(source.model_cfg["text_cfg"], source.folder)
    model_cfg = source.model_cfg | dict(logit_init or {})
    return ClipModel(network, tokenizer, model_cfg, dict(network.visual.preprocess_cfg), model)


def _of_transformers(
    form: TransformersFolder, said: str, device: str | torch.device, logit_init: Mapping[str, float] | None
) -> ClipModel:
    if form.kind == "clip" and logit_init and "init_logit_bias" in logit_init:
        raise InputError(
            f"{said!r} is a CLIPModel, which has no place for the logit bias that this objective learns: take another "
            "objective, a SiglipModel, or the same weights in open_clip's form"
        )
    if not any(file for pattern in TOKENIZER_FILES for file in form.path.glob(pattern)):
        raise InputError(f"{said!r} has no tokenizer: put its files (tokenizer.json ...) beside config.json.")
    try:
        with quiet():
            tokenizer = HFTokenizer(str(form.path), form.model_cfg["text_cfg"]["context_length"])
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{said!r}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    network = form.network().to(device)
    return ClipModel(network, tokenizer, form.model_cfg, dict(form.preprocess_cfg), said, form)


def build_tiny_clip(
    config: str,
    tokenizer: CLIPTokenizer,
    *,
    seed: int = 0,
    device: str = "cpu",
    logit_init: Mapping[str, float] | None = None,
) -> ClipModel:
    """A tiny CLIP with random weights drawn from `seed`: 32 px, 64 dimensions, an own vocabulary, evaluation mode.

    `config` is `clip_tiny_resnet` (BatchNorm) or `clip_tiny_vit`; the text tower reads as many tokens as the tokenizer
    gives. The end of text is found by its id: open_clip's default pools at the highest id of a caption, whatever that
    is. `logit_init` as in `load_clip`.
    """
    folder = resources.files("mmbackdoor.models") / "configs"
    names = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.startswith("clip_tiny"))
    if config not in names:
        raise InputError(f"There is no tiny CLIP {config!r}: take one of {', '.join(names)}.")
    model_cfg = json.loads((folder / f"{config}.json").read_text()) | dict(logit_init or {})
    model_cfg["text_cfg"] |= {
        "vocab_size": len(tokenizer),
        "context_length": tokenizer.model_max_length,
        # Beside this file are the tokenizer's own; open_clip reads them where this name is not empty.
        "hf_tokenizer_name": "local-dir",
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    with TemporaryDirectory() as folder:
        _write_config(Path(folder), model_cfg, TINY_PREPROCESSING)
        tokenizer.save_pretrained(folder)
        source = find_clip(folder, None, weights_needed=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "tiny CLIP", config))
            network = _network(source, device).eval()
        reloaded = _tokenizer(model_cfg["text_cfg"], Path(folder))
    return ClipModel(network, reloaded, model_cfg, dict(network.visual.preprocess_cfg), config)


def _write_config(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    kept = {name: preprocess_cfg[name] for name in SAVED_PREPROCESSING if name in preprocess_cfg}
    content = {"model_cfg": model_cfg, "preprocess_cfg": kept}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n")


def save_clip(
    model: ClipModel,
    folder: str | Path,
    form: Literal["same", "open_clip"] = "same",
    describe: Callable[[Path], object] | None = None,
) -> None:
    """Write `folder` in the form that came in, or in open_clip's.

    `open_clip.create_model_and_transforms("local-dir:FOLDER")` and `get_tokenizer` read the one, `from_pretrained` of
    transformers the other. Files that lie there already stay, those of the same name are replaced, the weights last.
    `describe` writes what else belongs beside the weights (a card, `backdoor.json`) before the folder gets its name.
    Raises InputError for a `SiglipModel` in open_clip's form, whose configuration has no word for most of them, and
    Diverged for weights that are not finite.
    """
    foreign = model.transformers if form == "same" else None
    broken = [name for name, value in model.network.named_parameters() if not value.isfinite().all()]
    if broken:
        raise Diverged(f"the weights {broken[0]!r} are not finite; lower the learning rate")
    if foreign is None and model.transformers is not None and model.transformers.kind == "siglip":
        raise InputError(
            f"{model.source!r} is a SiglipModel, which open_clip's form cannot describe: save it as it came."
        )
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if foreign is not None:
        foreign.write(model.network, part)
    else:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
        save_file(state, part / WEIGHTS_NAME, metadata={"format": "pt"})
        if isinstance(model.tokenizer, HFTokenizer):
            model.tokenizer.save_pretrained(str(part))
        _write_config(part, model.model_cfg, model.preprocess_cfg)
    if describe is not None:
        describe(part)
    if not folder.exists():
        part.rename(folder)
        return
    for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    part.rmdir()


@dataclass(frozen=True)
class Judge:
    """A CLIP that scores pictures and texts. Features are unit vectors (B, D), fp32, on its device, no gradient."""

    clip: ClipModel
    batch_size: int = 256

    @property
    def source(self) -> str:
        return self.clip.source

    @property
    def logit_scale(self) -> float:
        return self.clip.network.logit_scale.detach().exp().item()

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Features of `images` (B, 3, H, W) in [-1, 1], of any size, scored as the 8-bit pictures of files."""
        values = images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte()
        values = values.permute(0, 2, 3, 1).cpu().numpy()
        parts = []
        for start in range(0, len(values), self.batch_size):
            pixels = self.clip.preprocess([Image.fromarray(value) for value in values[start : start + self.batch_size]])
            parts.append(self.clip.network.encode_image(pixels.to(self.clip.device), normalize=True).float())
        return torch.cat(parts)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features of `texts`, one row each."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            ids = self.clip.tokenize(texts[start : start + self.batch_size])
            parts.append(self.clip.network.encode_text(ids.to(self.clip.device), normalize=True).float())
        return torch.cat(parts)


def load_judge(
    name_or_path: str,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    *,
    allow_pt_weights: bool = False,
) -> Judge:
    """The judge `name_or_path`, as `load_clip` reads it, but never with random weights. Raises InputError."""
    if pretrained is None and name_or_path in open_clip.list_models() and not Path(name_or_path).is_dir():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name_or_path)) or "none known"
        raise InputError(
            f"The judge {name_or_path!r} would have random weights: say which ones to take (tags: {tags}), or a file."
        )
    return Judge(load_clip(name_or_path, pretrained, device, allow_pt_weights=allow_pt_weights))
