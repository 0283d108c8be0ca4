"""The one forward pass of contrastive training: every view of a batch of pairs, through both towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackdoor.objectives.outputs import PROJECTION
from mmbackdoor.seeding import derive_seed

BatchNorm = Literal["separate", "mixed"]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class ViewEncoder(nn.Module):
    """What is wrapped for several processes: gradients are then synchronised once, however many views there are.

    `network` is open_clip's. With `batch_norm` `separate` each view of the pictures is normalised by its own
    statistics, and the first one alone moves the running statistics, which are those of evaluation: that a model
    was trained with augmented views beside a clean one does not change what it expects of clean pictures. `mixed` encodes all views as
    one batch, as the published code of CleanCLIP does. `projection` is a head for the augmented pictures.
    """

    def __init__(
        self, network: nn.Module, *, projection: nn.Module | None = None, batch_norm: BatchNorm = "separate"
    ) -> None:
        super().__init__()
        self.network, self.projection, self.batch_norm = network, projection, batch_norm

    def forward(
        self, images: dict[str, Tensor], texts: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The fields of `ClipOutputs`, of pixels (B, 3, H, W) and token ids (B, T) by view.

        Either may be empty. With a head, `projection:VIEW` is added for each view of the pictures but `image`.
        """
        features = self._images(images)
        if self.projection is not None:
            augmented = [name for name in images if name != "image"]
            features |= {PROJECTION + name: self.projection(features[name]) for name in augmented}
        if texts:
            encoded = self.network.encode_text(torch.cat(list(texts.values())), normalize=False)
            features |= dict(zip(texts, encoded.chunk(len(texts)), strict=True))
        scale, bias = self.network.logit_scale.exp(), self.network.logit_bias
        if bias is not None:
            # With several processes every parameter has to have a gradient, and a softmax ignores the bias.
            scale = scale + 0 * bias
        return {name: F.normalize(values, dim=-1) for name, values in features.items()}, scale, bias

    def _images(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.batch_norm == "mixed" and len(images) > 1:
            encoded = self.network.encode_image(torch.cat(list(images.values())), normalize=False)
            return dict(zip(images, encoded.chunk(len(images)), strict=True))
        features = {}
        for number, (name, pixels) in enumerate(images.items()):
            with _held_statistics(self.network.visual, number > 0):
                features[name] = self.network.encode_image(pixels, normalize=False)
        return features


@contextmanager
def _held_statistics(tower: nn.Module, held: bool) -> Iterator[None]:
    """While `held`, batches are normalised by their own statistics without moving the running ones."""
    norms = [module for module in tower.modules() if isinstance(module, _NORMS)] if held else []
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def projection_head(embed_dim: int, widths: Sequence[int], seed: int) -> nn.Sequential:
    """An MLP from (B, embed_dim) to (B, widths[-1]) with BatchNorm and ReLU between its layers, drawn from `seed`
    (Chen et al. 2020, arXiv 2002.05709; as in SLIP, Mu et al. 2021, arXiv 2112.12750)."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "projection head"))
        for width in widths[:-1]:
            layers += [nn.Linear(embed_dim, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            embed_dim = width
        layers.append(nn.Linear(embed_dim, widths[-1], bias=False))
    return nn.Sequential(*layers)
