"""What cleaning a CLIP needs around the loop: which pairs are used, what the optimiser really does, the frozen start."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbackdoor.models.clip import ClipModel
from mmbackdoor.models.clip_encoder import BatchNorm, ViewEncoder
from mmbackdoor.train.batches import Share, open_shards
from mmbackdoor.train.clip import ClipBatch, clip_batches
from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.types import InputError

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def read_keys(file: str | Path) -> frozenset[str]:
    """The keys of a list with one a line, as `recipes/detect.py` writes it. Raises `InputError`."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list of keys {str(file)!r} cannot be read ({error}); give a text file, a key a line") from error
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not keys:
        raise InputError(f"the list of keys {str(file)!r} is empty; give a text file, a key a line")
    return keys


def keys_facts(file: str, keys: frozenset[str], used: int) -> dict[str, Any]:
    """For `removal.json`: which list it was, how many keys it has, how many of them the shards have."""
    return {"file": Path(file).name, "sha256": hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest(),
            "listed": len(keys), "used": used}  # fmt: skip


def effective(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate and the weight decay that the last step was made with, read from the optimiser itself: settings that are
    asked for and those that are in force have been known to differ. Decay is that of matrices; gains, biases and the
    temperature have none."""
    group = optimizer.param_groups[0]
    return {"learning_rate": group["lr"], "weight_decay": group["weight_decay"]}


def frozen(clip: ClipModel, batch_norm: BatchNorm) -> ViewEncoder:
    """The forward pass of a copy of `clip` that no training touches, in evaluation mode."""
    return ViewEncoder(deepcopy(clip.network), batch_norm=batch_norm).eval().requires_grad_(False)


@torch.no_grad()
def interpolate(network: nn.Module, before: Mapping[str, Tensor], share: float) -> None:
    """Every floating-point tensor becomes `share` * itself + (1 - `share`) * what it was `before` (Wortsman et al. 2022,
    arXiv 2109.01903, section 3); running statistics too."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(before[name].to(tensor), 1 - share)


@contextmanager
def interpolated(network: nn.Module, before: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Within, `network` is interpolated; afterwards it is what it was."""
    kept = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    interpolate(network, before, share)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                tensor.copy_(kept[name])


def first_pictures(
    train_data: str, share: Share, train: TrainConfig, seed: int, keys: frozenset[str] | None, clip: ClipModel
) -> Iterator[ClipBatch]:
    """The global batches from the first on, whole, however many processes share them: view `image` alone."""
    loader = open_shards(train_data, Share(share.global_batch_size), train, seed, keys=keys)
    return clip_batches(loader, clip, views=("image",), seed=seed, device=clip.device)


@contextmanager
def recalibrated(network: nn.Module, batches: Iterable[ClipBatch], count: int) -> Iterator[None]:
    """Within, BatchNorm's running statistics are means over the pictures (view `image`) of the first `count` batches;
    afterwards they are what they were. With `count` 0, or without BatchNorm, nothing happens.

    In training they trail behind the weights, and after a short run with a high rate a model is judged by statistics
    that are not its own: accuracy then reads lower than it is (in a tiny model 0.77 for 0.99).
    """
    norms = [module for module in network.visual.modules() if isinstance(module, _NORMS)] if count else []
    if not norms:
        yield
        return
    kept = [(norm, norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    training = network.training
    network.visual.train()
    for norm in norms:
        norm.reset_running_stats()
        # None is the mean over all batches.
        norm.momentum = None
    with torch.no_grad():
        for batch in itertools.islice(batches, count):
            network.encode_image(batch.images["image"])
    network.visual.train(training)
    try:
        yield
    finally:
        for norm, momentum, buffers in kept:
            norm.momentum = momentum
            norm.load_state_dict(buffers, strict=False)
