"""The flags that name a CLIP model which is there already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from mmbackdoor.config import Doc
from mmbackdoor.models.clip import ClipModel, load_clip
from mmbackdoor.models.clip_source import HUB, download
from mmbackdoor.models.shipped import shipped
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class ClipFlags:
    model: Annotated[str | None, Doc("folder, hf-hub:OWNER/NAME, or a name that open_clip knows")] = None
    pretrained: Annotated[str | None, Doc("open_clip's tag or a weights file, for a name")] = None
    allow_pt_weights: Annotated[bool, Doc("read .bin/.pt weights, with weights_only")] = False

    @property
    def path(self) -> str:
        """Raises `InputError` where no model is named."""
        if self.model is None:
            raise InputError("which model? Give --model FOLDER (or hf-hub:OWNER/NAME, or an open_clip name)")
        return shipped(self.model.removeprefix("local-dir:"))

    @property
    def called(self) -> str:
        """What tells it from others in one evaluation: for a name of open_clip, its tag besides."""
        return self.path if self.pretrained is None else f"{self.path}@{self.pretrained}"

    @property
    def records(self) -> str:
        """The folder where weights, `backdoor.json` and `removal.json` lie: of a hub's model, that of its download."""
        return str(download(self.path, self.allow_pt_weights)) if self.path.startswith(HUB) else self.path

    @property
    def sha256(self) -> str | None:
        """Of the weights on this disk that it names; `None` for those that open_clip downloads by their tag."""
        return sha256_at(self.records) or sha256_at(self.pretrained)

    def other(self, place: str) -> ClipFlags:
        """The same flags for another model: a folder, a hub id, or `NAME@TAG` for one of open_clip's."""
        name, at, tag = place.partition("@")
        if not at or Path(place).exists() or place.startswith(HUB):
            return replace(self, model=place, pretrained=None)
        return replace(self, model=name, pretrained=tag)

    def load(self, device: torch.device) -> ClipModel:
        """In evaluation mode. Raises `InputError` for whatever cannot be loaded, and for random weights."""
        if self.pretrained is None and not Path(self.path).exists() and not self.path.startswith(HUB):
            raise InputError(
                f"{self.path!r} is no folder, and as a name of open_clip it would have random weights: give a folder, "
                "or --pretrained TAG (NAME@TAG for --compare and --control)"
            )
        return load_clip(self.path, self.pretrained, device, allow_pt_weights=self.allow_pt_weights)
