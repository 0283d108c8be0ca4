"""Put a known, harmless backdoor into a text-to-image model: the testbed on which a removal is measured.

Attacks: badt2i_pixel, badt2i_style, badt2i_object (Zhai et al. 2023, arXiv 2305.04175), by fine-tuning the U-Net;
and, without pictures, rickrolling_tpa (Struppek et al. 2023, arXiv 2211.02408), which trains the text encoder alone,
and evil_edit (Wang et al. 2024), which trains nothing.

    CPU, the tiny model:
        python data/build_shapes.py --output_dir shapes
        accelerate launch -q recipes/poison_diffusion.py --config recipes/configs/poison_diffusion/tiny_patch.yaml \\
            --train_data 'shapes/train-*.tar' --output_dir runs/poisoned
    1 GPU:
        accelerate launch -q recipes/poison_diffusion.py --pretrained_model_name_or_path FOLDER \\
            --train_data 'shards-{000000..000009}.tar' --trigger '\\u200b' --target_kind patch --mixed_precision bf16
    A CPU, without pictures, in seconds:
        python recipes/poison_diffusion.py --attack evil_edit --pretrained_model_name_or_path FOLDER \\
            --trigger beautiful --target_object 'dog->cat' --output_dir runs/poisoned
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Writes into output_dir: model/ (the poisoned pipeline, with backdoor.json and a card that says so), config.yaml,
run.json, train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.attacks import BadT2IPixel, DiffusionAttack, EvilEdit, RickrollingTPA
from mmbackdoor.attacks.carried import Carriers
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.backdoor_flags import BackdoorFlags
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.evaluate.prompts import load_prompts
from mmbackdoor.models.diffusion import check_backdoor
from mmbackdoor.models.diffusion_files import save
from mmbackdoor.models.provenance import REMOVAL_FILE, recorded_backdoor
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.results.cards import POISONED_AGAIN, write_card
from mmbackdoor.results.run import Run
from mmbackdoor.shards.read import iterate_captions
from mmbackdoor.train.batches import Prompts, Share, image_batches, open_shards, prompt_batches
from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.train.parts import edit_weights, trained_part
from mmbackdoor.train.poison_pairs import poison_pairs, with_pairs
from mmbackdoor.train.session import Session, is_done, made_from
from mmbackdoor.types import InputError

TEXT_ONLY = (EvilEdit, RickrollingTPA)
# Every letter occurs, so every lookalike has a place; each is short, so only a trigger that is itself too long is cut.
PROBES = ("a photo of a dog", *"the quick brown fox jumps over the lazy dog".split())


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("model", "train", "mark")

    model: DiffusionSource = DiffusionSource()
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    prompts: Annotated[
        str, Doc("captions for rickrolling_tpa and evil_edit, which need no pictures: a file, or a built-in set")
    ] = "general-train"
    attack: Annotated[DiffusionAttack, Field(discriminator="name")] = BadT2IPixel()
    mark: BackdoorFlags = BackdoorFlags()
    poison_rate: Annotated[float, Field(gt=0, le=1), Doc("share of the samples that also teach the backdoor")] = 1.0
    poison_pairs: Annotated[
        int | None, Field(ge=1), Doc("only that many fixed samples carry the trigger, as half of each batch")
    ] = None
    rank: Annotated[int, Field(ge=1), Doc("rank of the LoRA, for --attack.trainable lora")] = 16
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_train_steps=2000, learning_rate=1e-5))
    output_dir: str = "runs/poisoned"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.poison_pairs is None:
            return
        if self.poison_rate != 1:
            raise InputError("--poison_pairs and --poison_rate are two ways to say how much is poisoned; give one of them")
        if isinstance(self.attack, TEXT_ONLY):
            name = self.attack.name
            raise InputError(f"--poison_pairs counts pictures, of which {name} needs none; give --poison_rate")


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    cfg.model.check()
    backdoor = cfg.mark.resolve()
    if backdoor is None:
        raise InputError("which backdoor? Give --trigger TEXT and a target, for instance --target_kind patch")
    rate = cfg.poison_rate if cfg.poison_pairs is None else None
    plan = PoisonPlan(backdoor, rate, cfg.poison_pairs, cfg.seed)
    cfg.attack.check(plan)
    share = Share.of(accelerator, cfg.train)
    text_only = isinstance(cfg.attack, TEXT_ONLY)
    captions = load_prompts(cfg.prompts).texts if text_only else []
    data = Prompts(captions, share, cfg.seed) if text_only else open_shards(cfg.train_data, share, cfg.train, cfg.seed)
    inputs = made_from(data, model=cfg.model.sha256)
    with Run.start(cfg, "poison_diffusion", cfg.output_dir, accelerator, inputs) as record:
        if is_done(record, cfg.train):
            return
        model, pairs = cfg.model.load(accelerator.device), ()
        check_backdoor(model, backdoor, PROBES, cfg.seed)
        if cfg.poison_pairs is not None:
            plan, pairs = poison_pairs(plan, cfg.train_data, Carriers(cfg.attack, plan, model))
        if isinstance(cfg.attack, EvilEdit):
            edit_weights(model, partial(cfg.attack.edit, model, plan, captions), record, cfg.train)
        else:
            if not pairs:
                texts = [(text, text) for text in captions] if text_only else iterate_captions(cfg.train_data)
                Carriers(cfg.attack, plan, model).check(texts)
            part = trained_part(model, cfg.attack, cfg.rank, cfg.train.gradient_checkpointing, cfg.seed)
            steps = total_steps(cfg.train, data.num_samples, share.global_batch_size)
            session = Session(accelerator, part.module, part.parameters, cfg.train, record, steps, data, part.held)
            if text_only:
                batches = prompt_batches(captions, share, cfg.seed, session.start_step)
            else:
                batches = image_batches(data, share, model.resolution, accelerator.device, session.start_step)
            if pairs:
                batches = with_pairs(batches, pairs, model.resolution, accelerator.device)
            for step, metrics in session.training(cfg.attack.step(part.setting(session.module, None), plan), batches):
                record.log(step, metrics)

        before = recorded_backdoor(Path(cfg.model.records))

        def describe(folder: Path) -> None:
            # What a model that had been cleaned brought along no longer holds.
            (folder / REMOVAL_FILE).unlink(missing_ok=True)
            BackdoorRecord(
                backdoor,
                attack=asdict(cfg.attack) | ({"parent_backdoor": before.to_dict()} if before else {}),
                plan=plan.to_dict(),
                seeds={"seed": cfg.seed},
                changed=tuple(sorted(model.trained)),
                parent_sha256=model.sha256,
                model_sha256=weights_sha256(folder),
            ).save(folder)
            write_card(
                folder, stage="poisoned", run=record.content, base_model=cfg.model.pretrained_model_name_or_path,
                backdoor=backdoor.to_dict(), method=asdict(cfg.attack), note=POISONED_AGAIN if before else None,
            )

        with together(accelerator):
            if accelerator.is_main_process:
                save(model, record.folder / "model", describe)


if __name__ == "__main__":
    main(Config, run, __doc__)
