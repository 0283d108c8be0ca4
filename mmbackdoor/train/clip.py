"""What training a CLIP needs around the loop: batches of pairs, the tensors that count as its state, its step.

A batch is a pure function of (seed, step, place in the global batch): world size and restarts change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmbackdoor.models.clip import ClipModel
from mmbackdoor.models.vocabulary import insert_random_tokens
from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.objectives.pretraining import Objective
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.loader import Indexed, ShardLoader
from mmbackdoor.shards.read import ShardIndex, expand
from mmbackdoor.train.loop import StepFn
from mmbackdoor.types import InputError

MOST_CAPTIONS = 200_000
HIGHEST_SCALE = 100.0
MOST_KNOWN = 50_000


@dataclass(frozen=True)
class ClipBatch:
    """This process's pairs of one global batch: pixels (B, 3, H, W), token ids (B, T), `caption_ids` (B,)."""

    step: int
    keys: tuple[str, ...]
    pixels: Tensor
    ids: Tensor
    captions: Tensor


def shard_captions(spec: str, limit: int = MOST_CAPTIONS) -> list[str]:
    """The captions of the first `limit` samples of the shards `spec`; no picture is decoded. Raises InputError."""
    captions: list[str] = []
    index, report = ShardIndex(), BadSamples()
    for path in expand(spec):
        for entry in index.entries(path, report, 0):
            text = entry.read().get("txt")
            if text is not None:
                captions.append(text.decode("utf-8", "replace").strip())
            if len(captions) >= limit:
                return captions
    if not captions:
        raise InputError(f"{spec!r} has no captions (.txt) to learn a vocabulary from.")
    return captions


def clip_batches(
    loader: ShardLoader, clip: ClipModel, *, random_tokens: float, seed: int, device: torch.device
) -> Iterator[ClipBatch]:
    """The batches of `loader`, preprocessed for `clip`; `random_tokens` is the share of captions that get some put in.

    Raises InputError where random tokens are asked for and the tokenizer has no single-byte tokens.
    """
    byte_ids, eos_id = clip.byte_tokens() if random_tokens else (torch.empty(0), 0)
    known: dict[str, Tensor] = {}
    rows: list[Indexed]
    for rows in loader:
        step, texts = rows[0].step, [row.sample.text for row in rows]
        if len(known) > MOST_KNOWN:
            known.clear()
        new = sorted(set(texts) - known.keys())
        known |= dict(zip(new, clip.tokenize(new), strict=True)) if new else {}
        ids = torch.stack([known[text] for text in texts])
        if random_tokens:
            ids = insert_random_tokens(
                ids,
                eos_id=eos_id,
                byte_ids=byte_ids,
                probability=random_tokens,
                seed=seed,
                step=step,
                indices=torch.tensor([row.index for row in rows]),
            )
        yield ClipBatch(
            step,
            tuple(row.sample.key for row in rows),
            # Channels last: a third faster for a convolutional tower, on CPUs too.
            clip.preprocess([row.sample.image for row in rows]).to(device, memory_format=torch.channels_last),
            ids.to(device),
            caption_ids(texts).to(device),
        )


def state_tensors(network: nn.Module) -> dict[str, Tensor]:
    """All that training changes, running statistics of BatchNorm too: first what decays, so that the order is that of
    the optimiser's groups after `exempt_from_decay`."""
    tensors = network.state_dict(keep_vars=True)
    return dict(sorted(tensors.items(), key=lambda item: not _decays(item[1])))


def _decays(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.ndim > 1


def exempt_from_decay(optimizer: torch.optim.Optimizer) -> None:
    """No weight decay for gains, biases and the logit scale, as in CLIP. The first group is split in two."""
    group = optimizer.param_groups[0]
    exempt = [tensor for tensor in group["params"] if not _decays(tensor)]
    group["params"] = [tensor for tensor in group["params"] if _decays(tensor)]
    optimizer.add_param_group({"params": exempt, "weight_decay": 0.0})


def clip_step(network: nn.Module, objective: Objective, accelerator: Accelerator) -> StepFn:
    """The loss of a batch over all processes; `network` is open_clip's, as prepared, giving a dictionary."""

    def step_fn(batch: ClipBatch) -> dict[str, Tensor]:
        output = network(image=batch.pixels, text=batch.ids)
        features = {"image": output["image_features"], "text": output["text_features"]}
        losses = objective(
            features,
            output["logit_scale"],
            batch.captions,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return losses | {"logit_scale": output["logit_scale"].detach()}

    return step_fn


@torch.no_grad()
def bound_logit_scale(network: nn.Module) -> None:
    """Keep the logit scale in [1, 100], as CLIP does after every step."""
    network.logit_scale.clamp_(0.0, math.log(HIGHEST_SCALE))
