"""The flags that name a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from mmbackdoor.config import Doc
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.shipped import shipped
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
        return shipped(self.pretrained_model_name_or_path)

    @property
    def records(self) -> str:
        """The folder where `backdoor.json` and `removal.json` lie: the model's, or that of its one file or LoRA."""
        place = Path(self.lora or self.path)
        return str(place.parent if place.is_file() else place)

    def other(self, place: str) -> DiffusionSource:
        """The same flags for another model."""
        return replace(self, pretrained_model_name_or_path=place)

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
