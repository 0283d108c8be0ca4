"""The flags that name a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from mmbackdoor.config import Doc
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.lora_files import is_lora
from mmbackdoor.models.shipped import shipped
from mmbackdoor.models.single_file import only_file
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class DiffusionSource:
    pretrained_model_name_or_path: Annotated[
        str | None, Doc("folder, hub id or one .safetensors file; 'tiny' is the model that comes with this package")
    ] = None
    revision: Annotated[str | None, Doc("branch, tag or commit of a hub id")] = None
    variant: Annotated[str | None, Doc("for instance fp16")] = None
    lora: Annotated[str | None, Doc("a LoRA file on top; it is then what is trained and saved")] = None
    pipeline_config: Annotated[str | None, Doc("configuration of a one-file checkpoint: sd15, sd21_base, sd21_v, sdxl, or a diffusers folder")] = None
    allow_pt_weights: Annotated[bool, Doc("read .bin/.pt/.ckpt weights, with weights_only")] = False
    resolution: Annotated[int | None, Doc("pixels; by default the model's own")] = None

    @property
    def path(self) -> str:
        """The folder, file or id as `load` takes it. Raises `InputError` where no model is named."""
        self.check()
        return only_file(shipped(self.pretrained_model_name_or_path))

    @property
    def called(self) -> str:
        """What tells it from others in one evaluation: its LoRA, else its path."""
        return self.lora or self.path

    @property
    def records(self) -> str:
        """The folder where `backdoor.json` and `removal.json` lie: the model's, or that of its one file or LoRA."""
        place = Path(self.lora or self.path)
        return str(place.parent if place.is_file() else place)

    @property
    def sha256(self) -> str | None:
        """Of the weights on this disk that it names, its LoRA's among them; `None` for a hub id."""
        found = [sha256_at(place) for place in (self.path, self.lora)]
        return "+".join(digest for digest in found if digest) or None

    def other(self, place: str) -> DiffusionSource:
        """The same flags for the model at `place`. If that is a LoRA, it is laid on this one's base; if it is none, it
        is taken without this one's LoRA and revision, and the configuration of a one-file checkpoint is for files alone."""
        if is_lora(place):
            return replace(self, lora=place)
        found = replace(self, pretrained_model_name_or_path=place, lora=None, revision=None)
        return found if Path(found.path).is_file() else replace(found, pipeline_config=None)

    def check(self) -> None:
        """Raises `InputError` where no model is named."""
        if self.pretrained_model_name_or_path is None:
            raise InputError("which model? Give --pretrained_model_name_or_path FOLDER (or a hub id, or 'tiny')")

    def load(self, device: torch.device) -> DiffusionModel:
        """Raises `InputError` for whatever cannot be loaded."""
        return load(
            self.path,
            revision=self.revision,
            variant=self.variant,
            lora=self.lora,
            config=self.pipeline_config,
            allow_pt_weights=self.allow_pt_weights,
            device=device,
            resolution=self.resolution,
        )
