"""Remove a backdoor from a CLIP by training it on clean pairs; neither the trigger nor its target need be known.

Removals: cleanclip (Bansal et al. 2023, arXiv 2303.03323), finetune, ssl_only, shrink_perturb (Verma et al. 2023, arXiv
2311.14948), par (Singh et al. 2024, arXiv 2412.00727), distill_anchor, reset_distill (ours). Defaults are CleanCLIP's, but
for what its "Differences" name (recipes/configs/clean_clip/rn50_cleanclip.yaml: as published).

    CPU, the tiny poisoned model of pretrain_clip (2 cores, a minute):
        accelerate launch -q recipes/clean_clip.py --config recipes/configs/clean_clip/tiny.yaml \\
            --model runs/poisoned_clip/model --train_data 'shapes/train-*.tar' --output_dir runs/cleaned_clip
    1 GPU, without the pairs that a detector found suspicious:
        accelerate launch -q recipes/clean_clip.py --model FOLDER --train_data 'clean-{000000..000009}.tar' \\
            --keep_keys runs/detected/kept.txt --defense cleanclip --lr 1e-5 --batch-size 64 --precision bf16 \\
            --dataloader_num_workers 8 --output_dir runs/cleaned_clip
    8 GPUs: the same with `accelerate launch -q --num_processes 8`, `--dataloader_num_workers 6` (negatives from all).

One stray poisoned pair in 100 000 can keep a backdoor alive: filter first (recipes/detect.py, --keep_keys). How much is
left depends on the rate: try several, and measure each with recipes/evaluate_clip.py.

Writes into output_dir: model/ (the form that came in, with removal.json, a card, and the parent's backdoor.json if it has
one), models/step-N/ (with --save_models_every N), config.yaml, run.json, train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.backdoor import FILE_NAME, BackdoorRecord
from mmbackdoor.config import Doc
from mmbackdoor.defenses.clip import CleanClip, ClipDefense
from mmbackdoor.entry import main
from mmbackdoor.models.clip import save_clip
from mmbackdoor.models.clip_encoder import BatchNorm, ViewEncoder
from mmbackdoor.models.clip_flags import ClipFlags
from mmbackdoor.models.clip_setting import ClipSetting
from mmbackdoor.models.provenance import check_provenance, poisoned_sha256, weight_changes, write_removal
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results.cards import write_card
from mmbackdoor.results.run import Run
from mmbackdoor.shards.write import write_file
from mmbackdoor.train.batches import Share, open_shards
from mmbackdoor.train.clip import bound_logit_scale, check_batch, clip_batches, exempt_from_decay, state_tensors
from mmbackdoor.train.clip_cleaning import (
    effective,
    first_pictures,
    frozen,
    interpolated,
    keys_facts,
    read_keys,
    recalibrated,
)
from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.train.optim import OPEN_CLIP_FLAGS, TrainConfig, total_steps
from mmbackdoor.train.session import Session, is_done, made_from


@dataclass(frozen=True)
class Config:
    ALIASES: ClassVar[dict[str, str]] = OPEN_CLIP_FLAGS

    model: ClipFlags = ClipFlags()
    train_data: Annotated[str, Doc("webdataset shards of clean pictures and captions")] = ""
    keep_keys: Annotated[str | None, Doc("file of the keys to train on, one a line; none: all")] = None
    defense: Annotated[ClipDefense, Field(discriminator="name")] = CleanClip()
    batch_norm: Annotated[BatchNorm, Doc("whether views share its statistics (mixed: published)")] = "separate"
    interpolation: Annotated[float, Field(gt=0, le=1), Doc("share of the cleaned weights; the rest is the parent's")] = 1.0
    recalibrate_batches: Annotated[int, Field(ge=0), Doc("to take BatchNorm's statistics from, when saving; 0: as trained")] = 0
    save_models_every: Annotated[int | None, Field(ge=1), Doc("steps between models to compare; none: the last one")] = None
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_train_epochs=10, train_batch_size=64, learning_rate=1e-5, lr_scheduler="cosine", lr_warmup_steps=50,
            adam_weight_decay=0.1,
        )
    )
    output_dir: str = "runs/cleaned_clip"
    seed: int = 0


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    check_batch(cfg.train, accelerator)
    parent = Path(cfg.model.records)
    share = Share.of(accelerator, cfg.train)
    keys = read_keys(cfg.keep_keys) if cfg.keep_keys else None
    loader = open_shards(cfg.train_data, share, cfg.train, cfg.seed, keys=keys)
    with Run.start(cfg, "clean_clip", cfg.output_dir, accelerator, made_from(loader, model=cfg.model.sha256)) as record:
        if is_done(record, cfg.train):
            return
        check_provenance(parent)
        clip = cfg.model.load(accelerator.device)
        before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in clip.network.state_dict().items()}
        anchor = frozen(clip, cfg.batch_norm) if cfg.defense.needs_anchor else None
        cfg.defense.edit(clip, cfg.seed)
        if cfg.train.gradient_checkpointing:
            clip.network.set_grad_checkpointing()
        encoder = ViewEncoder(clip.network, batch_norm=cfg.batch_norm).train()
        steps = total_steps(cfg.train, loader.num_samples, share.global_batch_size)
        held = {"the anchor": anchor.parameters()} if anchor is not None else {}
        session = Session(
            accelerator, encoder, state_tensors(encoder), cfg.train, record, steps, loader, held, contrastive=True
        )
        exempt_from_decay(session.optimizer)
        strength = "strong" if cfg.defense.augmentation == "strong" else "auto"
        batches = clip_batches(
            loader, clip, views=cfg.defense.views, seed=cfg.seed, device=accelerator.device, augmentation=strength
        )

        def write(folder: Path, done: int) -> None:
            def describe(part: Path) -> None:
                # Byte by byte: it is the parent's own record.
                known = (parent / FILE_NAME).read_bytes() if (parent / FILE_NAME).is_file() else None
                if known is not None:
                    write_file(part / FILE_NAME, known)
                write_removal(part, {
                    "method": asdict(cfg.defense),
                    "batch_norm": cfg.batch_norm,
                    "interpolation": cfg.interpolation,
                    "recalibrate_batches": cfg.recalibrate_batches,
                    "parent": cfg.model.path,
                    "parent_sha256": weights_sha256(parent) if parent.exists() else None,
                    "poisoned_sha256": poisoned_sha256(parent),
                    "steps": done,
                    "samples": done * share.global_batch_size,
                    "keep_keys": keys_facts(cfg.keep_keys, keys, loader.num_samples) if keys else None,
                    "seed": cfg.seed,
                    "weights": weight_changes(before, clip.network.state_dict()),
                })  # fmt: skip
                write_card(
                    part, stage="cleaned", run=record.content, base_model=cfg.model.path, method=asdict(cfg.defense),
                    backdoor=BackdoorRecord.load(part).backdoor.to_dict() if known else None, library="open_clip",
                )

            with together(accelerator):
                if accelerator.is_main_process:
                    pictures = first_pictures(cfg.train_data, share, cfg.train, cfg.seed, keys, clip)
                    with (
                        session.averaged(),
                        interpolated(clip.network, before, cfg.interpolation),
                        recalibrated(clip.network, pictures, cfg.recalibrate_batches),
                    ):
                        save_clip(clip, folder, describe=describe)

        setting = ClipSetting(
            clip, session.module, anchor, cfg.seed, accelerator.process_index, accelerator.num_processes
        )
        for step, metrics in session.training(cfg.defense.step(setting), batches):
            bound_logit_scale(clip.network)
            record.log(step, metrics | effective(session.optimizer))
            if cfg.save_models_every and step % cfg.save_models_every == 0:
                write(record.folder / "models" / f"step-{step}", step)
        encoder.eval()
        record.counters |= {"pairs": loader.num_samples, "cut_captions": clip.cut_captions}
        write(record.folder / "model", steps)


if __name__ == "__main__":
    main(Config, run, __doc__)
