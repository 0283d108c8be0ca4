"""What training a CLIP needs around the loop: batches of pairs, the tensors that count as its state, its step.

A batch is a pure function of (seed, step, place in the global batch): world size and restarts change nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmbackdoor.models.clip import ClipModel, resize_crop
from mmbackdoor.models.vocabulary import insert_random_tokens
from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.objectives.outputs import VIEWS, ClipOutputs
from mmbackdoor.objectives.pretraining import Objective
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.poison_clip import poisoned_sample
from mmbackdoor.seeding import derive_seed
from mmbackdoor.shards.loader import Indexed, ShardLoader
from mmbackdoor.shards.read import iterate_captions, iterate_keys
from mmbackdoor.train.loop import StepFn
from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.train.views import Strength, image_view, text_view
from mmbackdoor.types import InputError, Sample

MOST_CAPTIONS = 200_000
HIGHEST_SCALE = 100.0
MOST_KNOWN = 50_000


@dataclass(frozen=True)
class ClipBatch:
    """This process's pairs of one global batch, by view: pixels (B, 3, H, W), token ids (B, T); and the `caption_ids`
    (B,) of the captions as they stand in the batch, poisoned ones too."""

    step: int
    keys: tuple[str, ...]
    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    captions: Tensor


@dataclass(frozen=True)
class ViewedPair:
    """The views of one pair: pictures uint8 (H, W, 3) in the model's size, and captions. `text` is the caption."""

    index: int
    step: int
    key: str
    text: str
    images: dict[str, np.ndarray]
    texts: dict[str, str]


@dataclass(frozen=True)
class PairViews:
    """Makes the `views` of a pair that a loader gives: poisons it if its key is among those of `poison`, augments,
    resizes and crops. A pure function of (seed, key, epoch), which runs where the sample is read.

    A trigger that belongs after resize and crop is put on the picture in the model's size, before any augmentation:
    what is augmented is the picture of the poisoned data set, wherever the trigger belongs.
    """

    views: tuple[str, ...]
    preprocess_cfg: Mapping[str, Any]
    steps_per_epoch: int
    seed: int
    augmentation: Strength = "auto"
    poison: tuple[PoisonPlan, frozenset[str]] | None = None

    def __post_init__(self) -> None:
        unknown = set(self.views) - set(VIEWS)
        if unknown or not self.views:
            raise ValueError(f"views are some of {', '.join(VIEWS)}, not {self.views}")

    def __call__(self, row: Indexed) -> ViewedPair:
        sample, epoch = self._poisoned(row.sample), row.step // self.steps_per_epoch
        pictures, texts = {}, {}
        for view in self.views:
            if view == "text":
                texts[view] = sample.text
            elif view == "text_aug":
                texts[view] = text_view(sample.text, sample.key, epoch, self.seed)
            elif view == "image":
                pictures[view] = sample.image
            else:
                draw = int(view == "image_aug2")
                pictures[view] = image_view(
                    sample.image, sample.key, epoch, self.seed, draw=draw, strength=self.augmentation
                )
        resized = resize_crop(list(pictures.values()), self.preprocess_cfg)
        images = {view: np.asarray(picture) for view, picture in zip(pictures, resized, strict=True)}
        return ViewedPair(row.index, row.step, sample.key, sample.text, images, texts)

    def _poisoned(self, sample: Sample) -> Sample:
        if self.poison is None or sample.key not in self.poison[1]:
            return sample
        plan, chosen = self.poison
        sample = poisoned_sample(plan, chosen, sample)
        if plan.backdoor.image_trigger(sample.key, plan.seed).place == "source":
            return sample
        (picture,) = resize_crop([sample.image], self.preprocess_cfg)
        return replace(sample, image=plan.backdoor.mark_image(picture, sample.key, plan.seed, "input"))


def shard_captions(spec: str, limit: int = MOST_CAPTIONS) -> list[str]:
    """The first `limit` readable captions of the shards `spec`; no picture is decoded. Raises InputError."""
    captions = [caption for _, caption in itertools.islice(iterate_captions(spec), limit)]
    if not captions:
        raise InputError(f"{spec!r} has no captions (.txt) to learn a vocabulary from.")
    return captions


def first_keys(spec: str, count: int) -> frozenset[str]:
    """The `count` keys of the shards `spec` with the smallest hashes: smaller sets are parts of larger ones, whatever
    the run's seed. Raises InputError where there are fewer, and where a key comes twice."""
    keys = sorted(iterate_keys(spec), key=lambda key: (derive_seed(0, "first keys", key), key))
    if len(keys) < count:
        raise InputError(f"{count} pairs are more than the {len(keys)} of {spec!r}; lower --num_samples")
    return frozenset(keys[:count])


def clip_batches(
    loader: ShardLoader,
    clip: ClipModel,
    *,
    views: tuple[str, ...] = ("image", "text"),
    poison: tuple[PoisonPlan, frozenset[str]] | None = None,
    random_tokens: float = 0.0,
    seed: int,
    device: torch.device,
    augmentation: Strength = "auto",
) -> Iterator[ClipBatch]:
    """The batches of `loader`, preprocessed for `clip`, in the `views` (of `VIEWS`) that the training looks at.

    `poison` is a plan and the keys that it chose; `random_tokens` is the share of captions that get some put in;
    `augmentation` says how pictures are augmented (see `image_view`). Raises InputError where random tokens are asked
    for and the tokenizer has no single-byte tokens.
    """
    byte_ids, eos_id = clip.byte_tokens() if random_tokens else (torch.empty(0), 0)
    known: dict[str, Tensor] = {}
    pairs = PairViews(views, clip.preprocess_cfg, loader.steps_per_epoch, seed, augmentation, poison)
    rows: list[ViewedPair]
    for rows in loader.mapped(pairs):
        step, images, texts = rows[0].step, {}, {}
        for view in rows[0].images:
            # Channels last: a third faster for a convolutional tower, on CPUs too.
            pixels = clip.normalise([row.images[view] for row in rows])
            images[view] = pixels.to(device, memory_format=torch.channels_last)
        for view in rows[0].texts:
            ids = _ids([row.texts[view] for row in rows], clip, known)
            if random_tokens:
                ids = insert_random_tokens(
                    ids,
                    eos_id=eos_id,
                    byte_ids=byte_ids,
                    probability=random_tokens,
                    # The same tokens in both views of a caption would be what tells it from others.
                    seed=seed if view == "text" else derive_seed(seed, view),
                    step=step,
                    indices=torch.tensor([row.index for row in rows]),
                )
            texts[view] = ids.to(device)
        captions = caption_ids([row.text for row in rows]).to(device)
        yield ClipBatch(step, tuple(row.key for row in rows), images, texts, captions)


def _ids(texts: list[str], clip: ClipModel, known: dict[str, Tensor]) -> Tensor:
    """Token ids (B, T) of `texts`, through what is `known`."""
    if len(known) > MOST_KNOWN:
        known.clear()
    new = sorted(set(texts) - known.keys())
    known |= dict(zip(new, clip.tokenize(new), strict=True)) if new else {}
    return torch.stack([known[text] for text in texts])


def check_batch(train: TrainConfig, accelerator: Accelerator) -> None:
    """Raises InputError where a step has too few pairs for a contrastive loss, or would not have them at once."""
    if train.gradient_accumulation_steps > 1:
        raise InputError(
            f"--gradient_accumulation_steps {train.gradient_accumulation_steps} adds no negatives to a contrastive "
            "loss; raise --train_batch_size or the number of processes instead"
        )
    if train.train_batch_size * accelerator.num_processes < 2:
        raise InputError("a batch of 1 pair has nothing to be told apart from; raise --train_batch_size")


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


def clip_step(encoder: nn.Module, objective: Objective, accelerator: Accelerator) -> StepFn:
    """The loss of a batch over all processes; `encoder` is a `ViewEncoder`, as prepared."""

    def step_fn(batch: ClipBatch) -> dict[str, Tensor]:
        outputs = ClipOutputs(*encoder(batch.images, batch.texts))
        losses = objective(
            outputs,
            batch.captions,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        logged = {"logit_scale": outputs.logit_scale.detach()}
        if outputs.logit_bias is not None:
            logged["logit_bias"] = outputs.logit_bias.detach()
        return losses | logged

    return step_fn


@torch.no_grad()
def bound_logit_scale(network: nn.Module) -> None:
    """Keep the logit scale in [1, 100], as CLIP does after every step."""
    network.logit_scale.clamp_(0.0, math.log(HIGHEST_SCALE))
