"""Random weights for a CLIP that is there: what its architecture would have started from."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmbackdoor.seeding import derive_seed
from mmbackdoor.types import InputError

if TYPE_CHECKING:
    # Read by `mmbackdoor list` too, and open_clip takes seconds.
    from mmbackdoor.models.clip import ClipModel

KEPT = ("logit_scale", "logit_bias")
"""Temperature and bias are no features: they are neither shrunk nor perturbed."""


def initial_parameters(clip: ClipModel, seed: int) -> dict[str, Tensor]:
    """Freshly drawn parameters of `clip`'s architecture by name, on the CPU; the global generator is left alone.

    Raises `InputError` for a transformers `SiglipModel`, whose picture tower open_clip cannot build from its
    configuration.
    """
    import open_clip

    from mmbackdoor.models.clip_source import CONFIG_NAME, quiet

    if clip.transformers is not None and clip.transformers.kind == "siglip":
        raise InputError(
            f"{clip.source!r} is a SiglipModel, whose random beginning cannot be drawn; take a removal without it "
            "(cleanclip, par, distill_anchor)"
        )
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), quiet():
        content = {"model_cfg": clip.model_cfg, "preprocess_cfg": {}}
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(content))
        torch.manual_seed(derive_seed(seed, "initial parameters"))
        network = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@torch.no_grad()
def shrink_and_perturb(clip: ClipModel, keep: float, noise: float, seed: int) -> None:
    """Every parameter becomes `keep` * itself + `noise` * a fresh draw of it; see `KEPT` for those that stay."""
    fresh = initial_parameters(clip, seed)
    for name, parameter in clip.network.named_parameters():
        if name not in KEPT:
            parameter.mul_(keep).add_(fresh[name].to(parameter), alpha=noise)
