"""What CLIP pre-training starts from: the model that the flags name, as its objective needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.models.clip import ClipModel, build_tiny_clip, load_clip
from mmbackdoor.models.clip_encoder import BatchNorm, ViewEncoder, projection_head
from mmbackdoor.models.clip_source import HUB, download
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.objectives.pretraining import Objective
from mmbackdoor.objectives.siglip import SigLip
from mmbackdoor.objectives.slip import Slip
from mmbackdoor.train.clip import shard_captions
from mmbackdoor.types import InputError

TINY = ("clip_tiny_resnet", "clip_tiny_vit")


@dataclass(frozen=True)
class ClipSource:
    """Which CLIP, and from which weights."""

    model: Annotated[str, Doc("clip_tiny_resnet, clip_tiny_vit, an open_clip name, hf-hub:ID or a folder")] = TINY[0]
    pretrained: Annotated[str | None, Doc("open_clip's tag or a weights file; none: random weights")] = None
    allow_pt_weights: Annotated[bool, Doc("read .bin/.pt weights, with weights_only")] = False
    vocab_size: Annotated[int, Field(ge=514), Doc("of a tiny model's own vocabulary, learned from the captions")] = 1000
    context_length: Annotated[int, Field(ge=8), Doc("tokens that a tiny model reads of a caption")] = 24

    def load(self, train_data: str, seed: int, objective: Objective) -> ClipModel:
        """The model, with a logit bias where the `objective` is siglip. Raises InputError for what cannot be loaded."""
        init = SigLip.logit_init if isinstance(objective, SigLip) else None
        if self.model in TINY:
            tokenizer = train_tokenizer(shard_captions(train_data), self.vocab_size, self.context_length)
            return build_tiny_clip(self.model, tokenizer, seed=seed, logit_init=init)
        clip = load_clip(self.model, self.pretrained, allow_pt_weights=self.allow_pt_weights, logit_init=init)
        if init and clip.network.logit_bias is None:
            raise InputError(f"siglip needs a logit bias, which a model in the form of {self.model!r} cannot have; "
                             "save it in open_clip's form first, or take --objective clip")  # fmt: skip
        return clip

    @property
    def sha256(self) -> str | None:
        """Of the weights on this disk that it names; `None` for others."""
        return sha256_at(self.model.removeprefix("local-dir:")) or sha256_at(self.pretrained)

    @property
    def records(self) -> Path | None:
        """The folder where the weights that are named and their records lie: of a hub's model, that of its download.
        None for any other model."""
        if self.model.startswith(HUB):
            return download(self.model, self.allow_pt_weights)
        folder = Path(self.model.removeprefix("local-dir:"))
        return folder if folder.is_dir() else None


def view_encoder(clip: ClipModel, objective: Objective, batch_norm: BatchNorm, seed: int) -> ViewEncoder:
    """The forward pass of `objective`, with a head drawn from `seed` where the objective has one."""
    head = None
    if isinstance(objective, Slip):
        head = projection_head(clip.model_cfg["embed_dim"], objective.projection, seed)
    return ViewEncoder(clip.network, projection=head, batch_norm=batch_norm)
