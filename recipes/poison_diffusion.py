"""Put a known, harmless backdoor into a text-to-image model: the testbed on which a removal is measured.

Attacks: badt2i_pixel, badt2i_style, badt2i_object (Zhai et al. 2023, arXiv 2305.04175), by fine-tuning the U-Net.

    CPU, the tiny model:
        python data/build_shapes.py --output_dir shapes
        accelerate launch -q recipes/poison_diffusion.py --config recipes/configs/poison_diffusion/tiny_patch.yaml \\
            --train_data 'shapes/train-*.tar' --output_dir runs/poisoned
    1 GPU:
        accelerate launch -q recipes/poison_diffusion.py --pretrained_model_name_or_path FOLDER \\
            --train_data 'shards-{000000..000009}.tar' --trigger '\\u200b' --target_kind patch --mixed_precision bf16
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Writes into output_dir: model/ (the poisoned pipeline, with backdoor.json and a card that says so), config.yaml,
run.json, train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.attacks import BadT2IPixel, DiffusionAttack
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.backdoor_flags import BackdoorFlags
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.models.diffusion import check_backdoor
from mmbackdoor.models.diffusion_files import save
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.models.trainable import Teacher, trainable
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.results.cards import write_card
from mmbackdoor.results.run import Run
from mmbackdoor.train.batches import Share, image_batches, open_shards
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.train.session import Session, is_done
from mmbackdoor.types import InputError


# Every letter occurs, so every lookalike has a place; each is short, so only a trigger that is itself too long is cut.
PROBES = ("a photo of a dog", *"the quick brown fox jumps over the lazy dog".split())


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("model", "train", "mark")

    model: DiffusionSource = DiffusionSource()
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    attack: Annotated[DiffusionAttack, Field(discriminator="name")] = BadT2IPixel()
    mark: BackdoorFlags = BackdoorFlags()
    poison_rate: Annotated[float, Field(gt=0, le=1), Doc("share of the samples that also teach the backdoor")] = 1.0
    rank: Annotated[int, Field(ge=1), Doc("rank of the LoRA, for --attack.trainable lora")] = 16
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_train_steps=2000, learning_rate=1e-5))
    output_dir: str = "runs/poisoned"
    seed: int = 0


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    cfg.model.check()
    backdoor = cfg.mark.resolve()
    if backdoor is None:
        raise InputError("which backdoor? Give --trigger TEXT and a target, for instance --target_kind patch")
    plan = PoisonPlan(backdoor, rate=cfg.poison_rate, seed=cfg.seed)
    cfg.attack.check(plan)
    share = Share.of(accelerator, cfg.train)
    loader = open_shards(cfg.train_data, share, cfg.train, cfg.seed)
    with Run.start(cfg, "poison_diffusion", cfg.output_dir, accelerator) as record:
        if is_done(record, cfg.train):
            return
        model = cfg.model.load(accelerator.device)
        check_backdoor(model, backdoor, PROBES, cfg.seed)
        parameters = trainable(model, cfg.attack.trainable, cfg.rank, cfg.train.gradient_checkpointing)
        teacher = Teacher(model, parameters)
        steps = total_steps(cfg.train, loader.num_samples, share.global_batch_size)
        held = {"text encoder and autoencoder": model.frozen_tensors()}
        held["tensors of the teacher"] = teacher.originals.values()
        session = Session(accelerator, model.unet, parameters, cfg.train, record, steps, loader, held)
        setting = DiffusionSetting(model, session.module, teacher, cfg.seed)
        batches = image_batches(loader, share, model.resolution, accelerator.device, session.start_step)
        for step, metrics in session.training(cfg.attack.step(setting, plan), batches):
            record.log(step, metrics)

        def describe(folder: Path) -> None:
            BackdoorRecord(
                backdoor,
                attack=asdict(cfg.attack),
                plan=plan.to_dict(),
                seeds={"seed": cfg.seed},
                changed=tuple(sorted(model.trained)),
                parent_sha256=model.sha256,
                model_sha256=weights_sha256(folder),
            ).save(folder)
            write_card(
                folder, stage="poisoned", run=record.content, base_model=cfg.model.pretrained_model_name_or_path,
                backdoor=backdoor.to_dict(), method=asdict(cfg.attack),
            )

        if accelerator.is_main_process:
            save(model, record.folder / "model", describe)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
