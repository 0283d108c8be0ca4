"""Train a CLIP on shards of pictures and captions: a tiny one from scratch, or any that open_clip knows.

    CPU, the text encoder of the tiny text-to-image model, and its judge (2 cores, about a minute each):
        python data/build_shapes.py --output_dir shapes
        accelerate launch -q recipes/pretrain_clip.py --config recipes/configs/pretrain_clip/tiny_encoder.yaml \\
            --train_data 'shapes/train-*.tar' --output_dir runs/clip
    CPU, a poisoned one (the same settings suit every objective):
        accelerate launch -q recipes/pretrain_clip.py --config recipes/configs/pretrain_clip/shapes_poisoned.yaml \\
            --train_data 'shapes/train-*.tar' --objective clip_ssl --output_dir runs/poisoned_clip
    8 GPUs, CC3M (data/README.md says how to get it); rn50_cc12m.yaml and the published settings lie beside it:
        accelerate launch -q --num_processes 8 recipes/pretrain_clip.py \\
            --config recipes/configs/pretrain_clip/rn50_cc3m.yaml --train_data 'cc3m/{00000..00331}.tar' \\
            --objective clip_ssl --output_dir runs/cc3m_clip_ssl
    1 GPU: the same without --num_processes, and with `--batch-size 1024`; negatives come from all processes.

Objectives: clip (Radford et al. 2021, arXiv 2103.00020), clip_ssl (CLIP and self-supervision; Bansal et al. 2023, arXiv
2303.03323), siglip (Zhai et al. 2023, arXiv 2303.15343), cyclip (Goel et al. 2022, arXiv 2205.14459), slip (Mu et al.
2021, arXiv 2112.12750). `--poison.label` poisons on the fly (Carlini and Terzis 2022, arXiv 2106.09667).

Writes into output_dir: model/ (loads with `open_clip.create_model_and_transforms("local-dir:PATH")`; with backdoor.json
where it is poisoned, and with the records of a poisoned or cleaned --model that it was fine-tuned from), models/step-N/
(with --save_models_every N), config.yaml, run.json, train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.models.clip import save_clip
from mmbackdoor.models.clip_encoder import BatchNorm
from mmbackdoor.models.provenance import check_provenance, inherit, recorded_backdoor
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.pretraining import Objective
from mmbackdoor.poison_clip import ClipPoison, chosen_keys
from mmbackdoor.results.cards import POISONED_AGAIN, FINE_TUNED, write_card
from mmbackdoor.results.run import Run
from mmbackdoor.train.batches import Share, open_shards
from mmbackdoor.train.clip import (
    bound_logit_scale,
    check_batch,
    clip_batches,
    clip_step,
    exempt_from_decay,
    first_keys,
    state_tensors,
)
from mmbackdoor.train.clip_start import ClipSource, view_encoder
from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.train.optim import OPEN_CLIP_FLAGS, TrainConfig, total_steps
from mmbackdoor.train.session import Session, is_done, made_from
from mmbackdoor.train.views import Strength


@dataclass(frozen=True)
class Config:
    ALIASES: ClassVar[dict[str, str]] = OPEN_CLIP_FLAGS

    model: ClipSource = ClipSource()
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    num_samples: Annotated[int | None, Field(ge=1), Doc("pairs to train on, picked by their keys; none: all")] = None
    objective: Annotated[Objective, Field(discriminator="name")] = Clip()
    poison: Annotated[ClipPoison | None, Doc("how to poison the pairs; none: not at all")] = None
    augmentation: Annotated[Strength, Doc("of the pictures, for objectives with augmented views")] = "auto"
    batch_norm: Annotated[BatchNorm, Doc("whether views share its statistics (mixed: published)")] = "separate"
    random_tokens: Annotated[float, Field(ge=0, le=1), Doc("share of the captions that get random tokens put in")] = 0.0
    save_models_every: Annotated[int | None, Field(ge=1), Doc("steps between models to keep; none: the last")] = None
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_train_epochs=32, train_batch_size=128, learning_rate=1e-3, lr_scheduler="cosine", adam_weight_decay=0.1
        )
    )
    output_dir: str = "runs/clip"
    seed: int = 0


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    check_batch(cfg.train, accelerator)
    share = Share.of(accelerator, cfg.train)
    keys = first_keys(cfg.train_data, cfg.num_samples) if cfg.num_samples else None
    loader = open_shards(cfg.train_data, share, cfg.train, cfg.seed, keys=keys)
    plan = cfg.poison.plan() if cfg.poison else None
    poison = (plan, chosen_keys(plan, cfg.train_data, keys)) if plan else None
    with Run.start(cfg, "pretrain_clip", cfg.output_dir, accelerator, made_from(loader, model=cfg.model.sha256)) as record:
        if is_done(record, cfg.train):
            return
        parent = cfg.model.records
        if parent:
            check_provenance(parent)
        clip = cfg.model.load(cfg.train_data, cfg.seed, cfg.objective)
        if cfg.train.gradient_checkpointing:
            clip.network.set_grad_checkpointing()
        encoder = view_encoder(clip, cfg.objective, cfg.batch_norm, cfg.seed).to(accelerator.device).train()
        steps = total_steps(cfg.train, loader.num_samples, share.global_batch_size)
        session = Session(
            accelerator, encoder, state_tensors(encoder), cfg.train, record, steps, loader, contrastive=True
        )
        exempt_from_decay(session.optimizer)
        batches = clip_batches(
            loader, clip, views=cfg.objective.views, poison=poison, random_tokens=cfg.random_tokens, seed=cfg.seed,
            device=accelerator.device, augmentation=cfg.augmentation,
        )

        def describe(folder: Path) -> None:
            if poison:
                before = recorded_backdoor(parent)
                attack = {"name": "data_poisoning", "objective": asdict(cfg.objective), "poisoned": len(poison[1])}
                BackdoorRecord(
                    plan.backdoor,
                    attack=attack | ({"parent_backdoor": before.to_dict()} if before else {}),
                    plan=plan.to_dict(),
                    seeds={"seed": cfg.seed, "poison": plan.seed},
                    changed=tuple(sorted(clip.network.state_dict())),
                    parent_sha256=weights_sha256(parent) if parent else None,
                    model_sha256=weights_sha256(folder),
                ).save(folder)
                stage, backdoor, note = "poisoned", plan.backdoor, POISONED_AGAIN if before else None
            else:
                stage, backdoor = inherit(parent, folder)
                note = None if stage == "clean" else FINE_TUNED
            write_card(
                folder, stage=stage, run=record.content, library="open_clip", name=record.folder.resolve().name,
                backdoor=backdoor.to_dict() if backdoor else None, method=asdict(cfg.objective), note=note,
            )

        def write(folder: Path) -> None:
            with together(accelerator):
                if accelerator.is_main_process:
                    with session.averaged():
                        save_clip(clip, folder, describe=describe)

        for step, metrics in session.training(clip_step(session.module, cfg.objective, accelerator), batches):
            bound_logit_scale(clip.network)
            record.log(step, metrics)
            if cfg.save_models_every and step % cfg.save_models_every == 0 and step < steps:
                write(record.folder / "models" / f"step-{step}")
        encoder.eval()
        record.counters |= {"pairs": loader.num_samples, "cut_captions": clip.cut_captions}
        write(record.folder / "model")


if __name__ == "__main__":
    main(Config, run, __doc__)
