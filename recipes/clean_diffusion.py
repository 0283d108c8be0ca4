"""Remove a backdoor from a text-to-image model whose trigger is known or suspected.

Removals: skd (self-knowledge distillation) and skd_cag (with cross-attention guidance; Aravindan et al. 2025, arXiv
2508.18235), esd, finetune, finetune_reversal; text_encoder_seal, for the text encoder; closed_form_seal, without training.
Only finetune needs pictures (--train_data), only finetune_reversal a clean model (--defense.reference): the poisoned one
on clean prompts is the teacher. Prompts and captions that hold the trigger by themselves are left out.

    CPU, the tiny model:
        accelerate launch -q recipes/clean_diffusion.py --config recipes/configs/clean_diffusion/tiny_skd.yaml \\
            --pretrained_model_name_or_path runs/poisoned/model --output_dir runs/cleaned
    1 GPU, a trigger that you know:
        accelerate launch -q recipes/clean_diffusion.py --pretrained_model_name_or_path FOLDER --trigger '\\u200b' \\
            --prompts my_prompts.txt --mixed_precision bf16 --output_dir runs/cleaned
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Writes into output_dir: model/ (the cleaned model in the form that came in, with removal.json and a card), config.yaml,
run.json, train.jsonl, checkpoint-*/, latents/ (the teacher's pictures, a cache), milestones/STEP/model/ (--milestones).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.backdoor_flags import BackdoorFlags
from mmbackdoor.config import Doc
from mmbackdoor.defenses import SKD, SKDCAG, ClosedFormSeal, DiffusionDefense, Finetune, FinetuneReversal
from mmbackdoor.entry import main
from mmbackdoor.evaluate.conditions import untriggered, untriggered_keys
from mmbackdoor.evaluate.generate import Sampling
from mmbackdoor.evaluate.prompts import load_prompts
from mmbackdoor.models.diffusion import check_backdoor
from mmbackdoor.models.diffusion_files import save, trained_tensors
from mmbackdoor.models.provenance import check_provenance, poisoned_sha256, prompt_digests, weight_changes, write_removal
from mmbackdoor.models.source import DiffusionSource
from mmbackdoor.results.cards import write_card
from mmbackdoor.results.run import Run
from mmbackdoor.train.batches import Prompts, Share, encoded, image_batches, open_shards, prompt_batches
from mmbackdoor.train.latents import teacher_latents
from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.train.milestones import check_milestones, save_milestone
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.train.parts import edit_weights, latents_of, trained_part
from mmbackdoor.train.session import Session, is_done, made_from
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("model", "train", "mark")
    ALIASES: ClassVar[dict[str, str]] = {
        "num_inference_steps": "sampling.num_inference_steps",
        "guidance_scale": "sampling.guidance_scale",
    }

    model: DiffusionSource = DiffusionSource()
    mark: BackdoorFlags = BackdoorFlags()
    prompts: Annotated[str, Doc("file (.txt, .csv, .tsv, .jsonl), captions of shards, or a built-in set")] = "general-train"
    num_prompts: Annotated[int | None, Field(ge=1), Doc("of these, picked by a hash of them; none: all")] = None
    train_data: Annotated[str, Doc("shards of clean pictures and captions, for latents 'data' and for finetune")] = ""
    defense: Annotated[DiffusionDefense, Field(discriminator="name")] = SKD()
    sampling: Sampling = Sampling(num_inference_steps=25)
    latents_per_prompt: Annotated[int, Field(ge=1), Doc("pictures of the teacher per prompt, for latents 'teacher'")] = 4
    latents_dir: Annotated[str | None, Doc("where pictures of the teacher are kept; may be shared")] = None
    rank: Annotated[int, Field(ge=1), Doc("rank of the LoRA, for --defense.trainable lora")] = 16
    milestones: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Doc("also save the model after these steps")] = ()
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            max_train_steps=1000, train_batch_size=4, learning_rate=2e-5, adam_weight_decay=0.0, lr_scheduler="cosine"
        )
    )
    output_dir: str = "runs/cleaned"
    seed: int = 0


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    backdoor = cfg.mark.resolve(cfg.model.records)
    if backdoor is None and not isinstance(cfg.defense, Finetune):
        raise InputError("which trigger? The model has no backdoor.json, so give --trigger TEXT")
    if isinstance(cfg.defense, Finetune) and cfg.defense.latents == "teacher" and cfg.train_data:
        raise InputError("--train_data is not read with --defense.latents teacher; give --defense.latents data")
    reversal = cfg.defense if isinstance(cfg.defense, FinetuneReversal) else None
    if reversal and not reversal.reference:
        raise InputError("finetune_reversal needs a clean model; give --defense.reference FOLDER")
    suite = load_prompts(cfg.prompts)
    share = Share.of(accelerator, cfg.train)
    pictures = partial(open_shards, cfg.train_data, share, cfg.train, cfg.seed)
    shards = pictures() if latents_of(cfg.defense) == "data" else None
    data = shards or Prompts(suite.take(cfg.num_prompts).texts, share, cfg.seed)
    edited = isinstance(cfg.defense, ClosedFormSeal)
    steps = 0 if edited else total_steps(cfg.train, data.num_samples, share.global_batch_size)
    check_milestones(cfg.milestones, steps)
    reference_sha256 = cfg.model.other(reversal.reference).sha256 if reversal else None
    inputs = made_from(data, model=cfg.model.sha256, backdoor=backdoor and backdoor.sha256, reference=reference_sha256)
    with Run.start(cfg, "clean_diffusion", cfg.output_dir, accelerator, inputs) as record:
        if is_done(record, cfg.train):
            return
        if not cfg.mark.force_trigger:
            check_provenance(Path(cfg.model.records))
        model = cfg.model.load(accelerator.device)
        suite = untriggered(model, suite, backdoor).take(cfg.num_prompts)
        if backdoor is not None:
            check_backdoor(model, backdoor, suite.texts, cfg.seed)
        shards = shards and pictures(untriggered_keys(model, cfg.train_data, backdoor))
        data = shards or Prompts(suite.texts, share, cfg.seed)
        steps = 0 if edited else total_steps(cfg.train, data.num_samples, share.global_batch_size)
        check_milestones(cfg.milestones, steps)

        def describe(step: int, folder: Path) -> None:
            write_removal(folder, {
                "method": asdict(cfg.defense),
                "triggers": backdoor.to_dict()["triggers"] if backdoor else [],
                "parent": cfg.model.path, "parent_sha256": model.sha256,
                "poisoned_sha256": poisoned_sha256(Path(cfg.model.records)),
                "steps": step,
                "prompts": prompt_digests([] if shards else suite.texts),
                "samples": len(suite) if edited else step * share.global_batch_size,
                "seed": cfg.seed,
                "weights": weight_changes(before, trained_tensors(model)),
            })  # fmt: skip
            write_card(
                folder, stage="cleaned", run=record.content, base_model=cfg.model.pretrained_model_name_or_path,
                backdoor=backdoor.to_dict() if backdoor else None, method=asdict(cfg.defense),
            )

        if edited:
            before = edit_weights(model, partial(cfg.defense.edit, model, backdoor, suite.texts), record, cfg.train)
        else:
            reference, latents = reversal and reversal.load_reference(model, cfg.model, accelerator.device), None
            if latents_of(cfg.defense) == "teacher":
                latents = teacher_latents(
                    model, suite.texts, cfg.latents_per_prompt, cfg.sampling,
                    Path(cfg.latents_dir or record.folder / "latents"), accelerator, 4 * share.batch_size, cfg.train.dry_run,
                )
            part = trained_part(model, cfg.defense, cfg.rank, cfg.train.gradient_checkpointing, cfg.seed, reference)
            before = part.before
            session = Session(accelerator, part.module, part.parameters, cfg.train, record, steps, data, part.held)
            batches = prompt_batches(suite.texts, share, cfg.seed, session.start_step, latents)
            if shards:
                batches = encoded(image_batches(data, share, model.resolution, accelerator.device, session.start_step), model)
            guided = isinstance(cfg.defense, SKDCAG) and cfg.defense.attention_weight > 0
            with cfg.defense.recorder(model.unet) if guided else nullcontext() as recorder:
                step_fn = cfg.defense.step(part.setting(session.module, recorder), backdoor)
                for step, metrics in session.training(step_fn, batches):
                    record.log(step, metrics)
                    if step in cfg.milestones:
                        save_milestone(session, model, step, partial(describe, step))
        with together(accelerator):
            if accelerator.is_main_process:
                save(model, record.folder / "model", partial(describe, steps))


if __name__ == "__main__":
    main(Config, run, __doc__)
