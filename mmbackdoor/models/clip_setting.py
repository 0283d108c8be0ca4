"""What a removal for CLIP works with: the model, its forward pass as prepared for training, and its frozen beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mmbackdoor.objectives.outputs import ClipOutputs

if TYPE_CHECKING:
    # Read by `mmbackdoor list` too, and open_clip takes seconds.
    from mmbackdoor.models.clip import ClipModel


class PairBatch(Protocol):
    """Pairs by view: pixels (B, 3, H, W), token ids (B, T); and the `caption_ids` (B,) of their captions."""

    @property
    def step(self) -> int: ...

    @property
    def images(self) -> dict[str, Tensor]: ...

    @property
    def texts(self) -> dict[str, Tensor]: ...

    @property
    def captions(self) -> Tensor: ...


@dataclass(frozen=True)
class ClipSetting:
    """`encoder` is the `ViewEncoder` of `clip`, wrapped for several processes; `anchor` that of a frozen copy of the
    model that came in, in evaluation mode, for removals that need it."""

    clip: ClipModel
    encoder: nn.Module
    anchor: nn.Module | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def encode(self, batch: PairBatch, views: Sequence[str]) -> ClipOutputs:
        """The `views` of a batch, with gradient, in one forward pass: to be called once for each batch."""
        return ClipOutputs(*self.encoder(*_chosen(batch, views)))

    def anchored(self, batch: PairBatch, views: Sequence[str]) -> ClipOutputs:
        """The `views` of a batch as the model that came in encodes them, without gradient."""
        if self.anchor is None:
            raise ValueError("this setting has no anchor: a removal that needs one says so by `needs_anchor`")
        with torch.no_grad():
            return ClipOutputs(*self.anchor(*_chosen(batch, views)))


def _chosen(batch: PairBatch, views: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images = {view: batch.images[view] for view in views if view.startswith("image")}
    return images, {view: batch.texts[view] for view in views if view.startswith("text")}
