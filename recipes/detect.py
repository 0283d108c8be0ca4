"""Score the pairs of a data set by how suspicious they are, and list those to train on: filtering before cleaning.

Detectors: dao, slof, k_dist (local outliers inside a random batch; Huang et al. 2025, arXiv 2502.01385), clip_cosine
(pairs that do not match). The outliers are those of the model that was trained on these pairs: give it as --model.

    CPU, a tiny poisoned model and its shards (seconds):
        accelerate launch -q recipes/detect.py --config recipes/configs/detect/tiny.yaml \\
            --model runs/poisoned_clip/model --train_data 'shapes-poisoned/train-*.tar' --output_dir runs/detected
    1 GPU:
        accelerate launch -q recipes/detect.py --model FOLDER --train_data 'cc3m-{000000..000331}.tar' --precision bf16 \\
            --batch_size 2048 --drop_fraction 0.01 --dataloader_num_workers 12 --output_dir runs/detected
    8 GPUs: the same with `accelerate launch -q --num_processes 8` and `--dataloader_num_workers 6`:
        each process encodes its part of every batch.

Local outliers are found where a batch has fewer poisoned pairs than a neighbourhood has places (--detector.k, 16): more
of them are a cluster of their own. In batches of 2048 that is up to 0.5 % of the data.

Neither backdoor.json nor the shards' own record of poison is given to a detector. Where the shards have that record
(poison_shards), it says afterwards how good the detector was.

Writes into output_dir: kept.txt (for --keep_keys of clean_clip) and dropped.txt (a key a line), scores.jsonl,
detection.json (counts, and AUROC where the truth is known), config.yaml, run.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from tqdm import tqdm

from mmbackdoor.config import Doc
from mmbackdoor.detectors import DAO, Detector
from mmbackdoor.entry import main
from mmbackdoor.evaluate.clip_data import ClipData
from mmbackdoor.evaluate.detection import encoded_batches, judge, score_batches, split, write_lists
from mmbackdoor.models.clip_flags import ClipFlags
from mmbackdoor.results.run import Run
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.order import STREAMS
from mmbackdoor.shards.write import write_file
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    ALIASES: ClassVar[dict[str, str]] = {"precision": "mixed_precision"}

    model: ClipFlags = ClipFlags()
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    detector: Annotated[Detector, Field(discriminator="name")] = DAO()
    batch_size: Annotated[int, Field(ge=2), Doc("samples among which outliers are sought, over all processes")] = 2048
    drop_fraction: Annotated[float, Field(gt=0, lt=1), Doc("share of the samples, the most suspicious, to leave out")] = 0.05
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], Doc("of the encoders")] = "no"
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    streams: Annotated[int, Field(ge=1), Doc("parts that shards are read in: at least processes x workers")] = STREAMS
    output_dir: str = "runs/detected"
    seed: int = 0


def open_data(cfg: Config, rank: int, world_size: int) -> ShardLoader:
    if not cfg.train_data:
        raise InputError("which pictures? Give --train_data 'shards-{000000..000099}.tar'")
    if cfg.batch_size % world_size:
        raise InputError(f"--batch_size {cfg.batch_size} cannot be shared evenly by {world_size} processes; give a multiple")
    return ShardLoader(
        cfg.train_data, seed=cfg.seed, batch_size=cfg.batch_size // world_size, rank=rank, world_size=world_size,
        num_workers=cfg.dataloader_num_workers, streams=cfg.streams, once=True, shuffle=True,
    )


def run(cfg: Config) -> None:
    accelerator = make_accelerator(None, cfg.seed, cfg.output_dir)
    weights = cfg.model.sha256
    loader = open_data(cfg, accelerator.process_index, accelerator.num_processes)
    inputs = {"model": weights, "data": ClipData("", loader.layout.paths).stamp}
    with Run.start(cfg, "detect", cfg.output_dir, accelerator, inputs, again=True) as record:
        if record.previous == "finished":
            return
        clip = cfg.model.load(accelerator.device)
        batches = tqdm(
            encoded_batches(loader, clip, accelerator, cfg.mixed_precision), desc="batches", unit="",
            total=max(1, loader.num_samples // cfg.batch_size), disable=not accelerator.is_main_process,
        )
        scored = score_batches(cfg.detector, batches, accelerator.device)
        kept, dropped = split(scored, cfg.drop_fraction)
        record.counters |= {"samples": len(scored), "bad_samples": loader.report.to_dict()}
        if accelerator.is_main_process:
            found = judge(kept, dropped)
            write_lists(record.folder, kept, dropped)
            write_file(record.folder / "detection.json", json.dumps(found, indent=1) + "\n")
            print("\n".join(loader.report.lines() + [describe(found)]), flush=True)
        accelerator.wait_for_everyone()


def describe(found: dict[str, float | int | None]) -> str:
    text = f"{found['dropped']} of {found['samples']} pairs are to be left out"
    # A small share of few pairs is none of them.
    text += f" (score {found['threshold']:.4g} and above)" if found["dropped"] else "; raise --drop_fraction"
    if "auroc" in found:
        text += (
            f"; AUROC {found['auroc']:.4f}, {found['poisoned_dropped']} of {found['poisoned']} poisoned pairs are among them"
        )
    return text


if __name__ == "__main__":
    main(Config, run, __doc__)
