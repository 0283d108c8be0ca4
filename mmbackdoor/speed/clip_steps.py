"""A step of CLIP training against bare open_clip on the same views: for `clip` a plain training step, for `clip_ssl`
the forwards and backwards of two pictures and two texts of each pair. Both with AdamW; pictures and ids are ready.

The losses of the floor are the plain ones: cross-entropy of open_clip's own logits. With several processes features are
gathered in both, and gradients are averaged by DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mmbackdoor.models.clip import ClipModel, load_clip
from mmbackdoor.models.clip_encoder import ViewEncoder
from mmbackdoor.models.shipped import shipped
from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.clip_ssl import ClipSsl
from mmbackdoor.objectives.contrastive import caption_ids, pair_logits
from mmbackdoor.objectives.pretraining import Objective
from mmbackdoor.seeding import torch_generator
from mmbackdoor.speed.bench import Bench, Precision, plain_adamw
from mmbackdoor.speed.rows import Goal, Row, compared
from mmbackdoor.speed.skd_steps import ENDLESS
from mmbackdoor.speed.timing import Timed
from mmbackdoor.train.clip import ClipBatch, bound_logit_scale, clip_step, exempt_from_decay, state_tensors
from mmbackdoor.train.loop import training_steps
from mmbackdoor.train.optim import TrainConfig, make_optimizer

MEASUREMENT = "clip"
MODELS = {"tiny": ("tiny_judge",), "sd15_reduced": ("RN50",), "sd15": ("RN50", "ViT-B-32")}
OBJECTIVES: tuple[tuple[Objective, Goal], ...] = ((Clip(), Goal(1.02)), (ClipSsl(), Goal(1.05)))
SELF_SUPERVISED = (("image", 0.5), ("text", 0.5))


class Bare(nn.Module):
    """open_clip's network: every view encoded by itself, in one call for DistributedDataParallel's sake."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: ClipBatch) -> tuple[dict[str, Tensor], Tensor]:
        found = {view: self.network.encode_image(pixels, normalize=True) for view, pixels in batch.images.items()}
        found |= {view: self.network.encode_text(ids, normalize=True) for view, ids in batch.texts.items()}
        return found, self.network.logit_scale.exp()


@dataclass(frozen=True)
class Floor:
    """A plain training step of `bare`, as prepared for several processes."""

    bare: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    rank: int = 0
    world_size: int = 1

    def loss(self, batch: ClipBatch) -> Tensor:
        with torch.autocast(batch.captions.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features, scale = self.bare(batch)
        loss = self._cross_entropy(features["image"], features["text"], scale, both=True)
        for view, weight in SELF_SUPERVISED:
            if f"{view}_aug" in features:
                loss = loss + weight * self._cross_entropy(features[view], features[f"{view}_aug"], scale, both=False)
        return loss

    def _cross_entropy(self, first: Tensor, second: Tensor, scale: Tensor, *, both: bool) -> Tensor:
        logits = pair_logits(first, second, scale, self.rank, self.world_size)
        own = torch.arange(len(first), device=first.device) + len(first) * self.rank
        terms = [F.cross_entropy(one, own) for one in (logits if both else logits[:1])]
        return sum(terms) / len(terms)

    def step(self, batch: ClipBatch) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def invented(clip: ClipModel, views: tuple[str, ...], size: int, seed: int, device: torch.device) -> ClipBatch:
    """A batch of noise with captions that are all different."""
    draws = torch_generator(seed, "speed", "pictures")
    height = clip.network.visual.image_size
    height, width = height if isinstance(height, (tuple, list)) else (height, height)
    captions = [f"a photo of number {number}" for number in range(size)]
    images, texts = {}, {}
    for view in views:
        if view.startswith("image"):
            pixels = torch.randn(size, 3, height, width, generator=draws)
            images[view] = pixels.to(device, memory_format=torch.channels_last)
        else:
            texts[view] = clip.tokenize([f"{caption} {view}" for caption in captions]).to(device)
    return ClipBatch(0, tuple(captions), images, texts, caption_ids(captions).to(device))


def contestants(
    clips: tuple[ClipModel, ClipModel], objective: Objective, batch: ClipBatch, accelerator: Accelerator,
    train: TrainConfig, seed: int,
) -> Mapping[str, Timed]:  # fmt: skip
    """Two equal models: the first for the floor, the second for ours."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    bare = Bare(clips[0].network).to(accelerator.device).train()
    wrapped = nn.parallel.DistributedDataParallel(bare) if world_size > 1 else bare
    plain = Floor(wrapped, _adamw(bare, train), train.mixed_precision, rank, world_size)

    encoder = ViewEncoder(clips[1].network).to(accelerator.device).train()
    tensors = state_tensors(encoder)
    module, optimizer = accelerator.prepare(encoder, make_optimizer(tensors, train))
    exempt_from_decay(optimizer)
    steps = training_steps(
        accelerator, clip_step(module, objective, accelerator), repeat(batch), optimizer, tensors, train, steps=ENDLESS,
        model=module, seed=seed,
    )  # fmt: skip

    def ours() -> None:
        next(steps)
        bound_logit_scale(clips[1].network)

    def floor() -> None:
        plain.step(batch)
        bound_logit_scale(clips[0].network)

    return {"floor": Timed(floor), "ours": Timed(ours)}


def _adamw(bare: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Gains and biases without decay, as open_clip's own training has it."""
    optimizer = plain_adamw(state_tensors(bare), train)
    exempt_from_decay(optimizer)
    return optimizer


def measure(bench: Bench, folder: Path, batch_size: int) -> list[Row]:
    found = []
    for name in MODELS[bench.architecture]:
        for objective, goal in OBJECTIVES:
            for precision in bench.precisions:
                accelerator, train = bench.accelerator(precision), bench.train(precision)
                clips = load_clip(shipped(name)), load_clip(shipped(name))
                clips[1].network.load_state_dict(clips[0].network.state_dict())
                batch = invented(clips[0], objective.views, batch_size, bench.seed, accelerator.device)
                timed = contestants(clips, objective, batch, accelerator, train, bench.seed)
                seconds = bench.time(timed, accelerator.wait_for_everyone)
                bench.look_into(timed, folder, f"{MEASUREMENT}-{name}-{objective.name}-{precision}")
                views = len(objective.views) // 2
                found.append(
                    compared(
                        MEASUREMENT, f"{objective.name} step, {name}", seconds["ours"],
                        f"bare open_clip: {views} image, {views} text", seconds["floor"],
                        bench.where(precision, accelerator.num_processes), goal=goal, note=f"batch {batch_size}",
                    )
                )  # fmt: skip
    return found
