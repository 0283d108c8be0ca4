"""Train a CLIP on shards of pictures and captions: a tiny one from scratch, or any that open_clip knows.

    CPU, the text encoder of the tiny text-to-image model, and its judge (2 cores, about a minute each):
        python data/build_shapes.py --output_dir shapes
        accelerate launch -q recipes/pretrain_clip.py --config recipes/configs/pretrain_clip/tiny_encoder.yaml \\
            --train_data 'shapes/train-*.tar' --output_dir runs/clip
    1 GPU:
        accelerate launch -q recipes/pretrain_clip.py --model RN50 --train_data 'cc3m-{000000..000331}.tar' \\
            --batch-size 512 --epochs 32 --lr 1e-3 --warmup 2000 --precision bf16
    8 GPUs: the same with `accelerate launch -q --num_processes 8`; negatives come from all of them.

Objectives: clip (Radford et al. 2021, arXiv 2103.00020). Writes into output_dir: model/ (loads with
`open_clip.create_model_and_transforms("local-dir:PATH")`), config.yaml, run.json, train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from accelerate import Accelerator
from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.models.clip import ClipModel, build_tiny_clip, load_clip, save_clip
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.pretraining import Objective
from mmbackdoor.results.cards import write_card
from mmbackdoor.results.run import Run
from mmbackdoor.train.batches import Share, open_shards
from mmbackdoor.train.clip import (
    bound_logit_scale,
    clip_batches,
    clip_step,
    exempt_from_decay,
    shard_captions,
    state_tensors,
)
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.train.session import Session, is_done
from mmbackdoor.types import InputError

TINY = ("clip_tiny_resnet", "clip_tiny_vit")


@dataclass(frozen=True)
class ClipSource:
    """Which CLIP, and from which weights."""

    model: Annotated[str, Doc("clip_tiny_resnet, clip_tiny_vit, an open_clip name, hf-hub:ID or a folder")] = TINY[0]
    pretrained: Annotated[str | None, Doc("open_clip's tag or a weights file; none: random weights")] = None
    allow_pt_weights: Annotated[bool, Doc("read .bin/.pt weights, with weights_only")] = False
    vocab_size: Annotated[int, Field(ge=514), Doc("of a tiny model's own vocabulary, learned from the captions")] = 1000

    def load(self, train_data: str, seed: int) -> ClipModel:
        if self.model in TINY:
            return build_tiny_clip(self.model, train_tokenizer(shard_captions(train_data), self.vocab_size), seed=seed)
        return load_clip(self.model, self.pretrained, allow_pt_weights=self.allow_pt_weights)


@dataclass(frozen=True)
class Config:
    ALIASES: ClassVar[dict[str, str]] = {
        "lr": "train.learning_rate",
        "wd": "train.adam_weight_decay",
        "batch_size": "train.train_batch_size",
        "epochs": "train.num_train_epochs",
        "warmup": "train.lr_warmup_steps",
        "precision": "train.mixed_precision",
    }

    model: ClipSource = ClipSource()
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    objective: Objective = Clip()
    random_tokens: Annotated[float, Field(ge=0, le=1), Doc("share of the captions that get random tokens put in")] = 0.0
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_train_epochs=32, train_batch_size=128, learning_rate=1e-3, lr_scheduler="cosine", adam_weight_decay=0.1
        )
    )
    output_dir: str = "runs/clip"
    seed: int = 0


def check(cfg: Config, accelerator: Accelerator) -> None:
    if cfg.train.gradient_accumulation_steps > 1:
        raise InputError(
            f"--gradient_accumulation_steps {cfg.train.gradient_accumulation_steps} adds no negatives to a contrastive "
            "loss; raise --train_batch_size or the number of processes instead"
        )
    pairs = cfg.train.train_batch_size * accelerator.num_processes
    if pairs < 2:
        raise InputError("a batch of 1 pair has nothing to be told apart from; raise --train_batch_size")


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    check(cfg, accelerator)
    share = Share.of(accelerator, cfg.train)
    samples = open_shards(cfg.train_data, share, cfg.train, cfg.seed).num_samples
    with Run.start(cfg, "pretrain_clip", cfg.output_dir, accelerator) as record:
        if is_done(record, cfg.train):
            return
        clip = cfg.model.load(cfg.train_data, cfg.seed)
        network = clip.network.to(accelerator.device).train()
        if cfg.train.gradient_checkpointing:
            network.set_grad_checkpointing()
        steps = total_steps(cfg.train, samples, share.global_batch_size)
        session = Session(accelerator, network, state_tensors(network), cfg.train, record, steps)
        exempt_from_decay(session.optimizer)
        loader = open_shards(cfg.train_data, share, cfg.train, cfg.seed, session.start_step)
        batches = clip_batches(
            loader, clip, random_tokens=cfg.random_tokens, seed=cfg.seed, device=accelerator.device
        )
        for step, metrics in session.training(clip_step(session.module, cfg.objective, accelerator), batches):
            bound_logit_scale(network)
            record.log(step, metrics)
        network.eval()
        if accelerator.is_main_process:
            save_clip(clip, record.folder / "model")
            name = record.folder.resolve().name
            write_card(record.folder / "model", stage="clean", run=record.content, library="open_clip", name=name)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
