"""Train a text-to-image model on shards: fine-tune one that you have, or make a tiny or a small one from scratch.

    CPU, the tiny model (its text encoder is that of a CLIP made by pretrain_clip):
        python data/build_shapes.py --output_dir shapes
        accelerate launch -q recipes/train_diffusion.py --config recipes/configs/train_diffusion/tiny.yaml \\
            --train_data 'shapes/train-*.tar' --text_encoder runs/clip/model --output_dir runs/clean
    CPU, the small model (64 px; its autoencoder is made by train_autoencoder, its text encoder by small_encoder.yaml):
        python data/build_shapes.py --scenes pairs --resolution 64 --output_dir pairs
        accelerate launch -q recipes/train_diffusion.py --config recipes/configs/train_diffusion/small.yaml \\
            --train_data 'pairs/train-*.tar' --text_encoder runs/encoder/model --autoencoder runs/autoencoder/model
    1 GPU:
        accelerate launch -q recipes/train_diffusion.py --pretrained_model_name_or_path FOLDER \\
            --train_data 'shards-{000000..000099}.tar' --mixed_precision bf16 --use_ema --snr_gamma 5
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Writes into output_dir: model/ (a stock diffusers pipeline; with the records of a poisoned or cleaned model that it was
fine-tuned from), config.yaml, run.json, train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mmbackdoor.backdoor import FILE_NAME as BACKDOOR_FILE
from mmbackdoor.config import Doc
from mmbackdoor.defenses.finetune import Finetune
from mmbackdoor.entry import main
from mmbackdoor.models.autoencoder import load_autoencoder
from mmbackdoor.models.clip import load_clip
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import save
from mmbackdoor.models.provenance import check_provenance, inherit
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.small import small_pipeline
from mmbackdoor.models.source import DiffusionSource, shipped
from mmbackdoor.models.text_encoder import to_clip_text_model
from mmbackdoor.models.tiny import tiny_pipeline
from mmbackdoor.models.trainable import trainable
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.results.cards import FINE_TUNED, write_card
from mmbackdoor.results.run import Run
from mmbackdoor.train.batches import Share, encoded, image_batches, open_shards, with_random_words
from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.train.session import Session, is_done, made_from
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("model", "train", "objective")

    model: DiffusionSource = DiffusionSource()
    from_scratch: Annotated[
        Literal["tiny", "small"] | None, Doc("make this architecture anew instead of loading a model")
    ] = None
    text_encoder: Annotated[str | None, Doc("folder of an open_clip model whose text tower is used, from scratch")] = None
    autoencoder: Annotated[str | None, Doc("folder of an AutoencoderKL, or a pipeline's, for the small model")] = None
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    objective: Finetune = Finetune()
    random_words: Annotated[float, Field(ge=0, le=1), Doc("share of the captions that get random words put in")] = 0.0
    rank: Annotated[int, Field(ge=1), Doc("rank of the LoRA, for --trainable lora")] = 16
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_train_steps=2000, learning_rate=1e-5))
    output_dir: str = "runs/clean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective.latents == "teacher":
            raise InputError(
                "--objective.latents teacher is for clean_diffusion; train_diffusion learns --train_data: leave it out"
            )


def make_model(cfg: Config, device) -> DiffusionModel:
    if cfg.from_scratch is None:
        if cfg.text_encoder or cfg.autoencoder:
            raise InputError("--text_encoder and --autoencoder are for new models; give --from_scratch tiny or small")
        return cfg.model.load(device)
    if cfg.text_encoder is None:
        raise InputError("--from_scratch needs the text tower of a CLIP; give --text_encoder FOLDER (see pretrain_clip)")
    if cfg.model.pretrained_model_name_or_path is not None:
        raise InputError("--from_scratch and --pretrained_model_name_or_path are two starts; give one of them")
    if cfg.from_scratch == "tiny" and cfg.autoencoder is not None:
        raise InputError("--from_scratch tiny works on pixels; leave --autoencoder out, or make a small one")
    if cfg.from_scratch == "small" and cfg.autoencoder is None:
        raise InputError("--from_scratch small needs --autoencoder FOLDER (see train_autoencoder)")
    tower = shipped(cfg.text_encoder)
    if (Path(tower) / BACKDOOR_FILE).is_file():
        raise InputError(
            f"--text_encoder {cfg.text_encoder!r} carries or carried a backdoor (see its backdoor.json), and a new model "
            "is to be a sound one; give another CLIP"
        )
    text_encoder, tokenizer = to_clip_text_model(load_clip(tower))
    if cfg.autoencoder is None:
        model = DiffusionModel(tiny_pipeline(text_encoder, tokenizer, cfg.seed))
    else:
        model = DiffusionModel(small_pipeline(text_encoder, tokenizer, load_autoencoder(cfg.autoencoder), cfg.seed))
    if cfg.model.resolution not in (None, model.resolution):
        raise InputError(f"--resolution {cfg.model.resolution} is not the new model's {model.resolution}; leave it out")
    return model.to(device)


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    share = Share.of(accelerator, cfg.train)
    loader = open_shards(cfg.train_data, share, cfg.train, cfg.seed)
    starts = {"text_encoder": sha256_at(cfg.text_encoder), "autoencoder": sha256_at(cfg.autoencoder)}
    if cfg.model.pretrained_model_name_or_path is not None:
        starts["model"] = cfg.model.sha256
    with Run.start(cfg, "train_diffusion", cfg.output_dir, accelerator, made_from(loader, **starts)) as record:
        if is_done(record, cfg.train):
            return
        if cfg.from_scratch is None:
            check_provenance(Path(cfg.model.records))
        model = make_model(cfg, accelerator.device)
        parameters = trainable(model, cfg.objective.trainable, cfg.rank, cfg.train.gradient_checkpointing)
        steps = total_steps(cfg.train, loader.num_samples, share.global_batch_size)
        held = {"text encoder and autoencoder": model.frozen_tensors()}
        session = Session(accelerator, model.unet, parameters, cfg.train, record, steps, loader, held)
        setting = DiffusionSetting(model, session.module, None, cfg.seed)
        batches = encoded(
            with_random_words(
                image_batches(loader, share, model.resolution, accelerator.device, session.start_step),
                cfg.random_words,
                cfg.seed,
            ),
            model,
        )
        for step, metrics in session.training(cfg.objective.step(setting, None), batches):
            record.log(step, metrics)

        def describe(folder: Path) -> None:
            stage, backdoor = inherit(model.files.records if model.files else None, folder)
            write_card(
                folder, stage=stage, run=record.content, base_model=cfg.model.pretrained_model_name_or_path,
                backdoor=backdoor.to_dict() if backdoor else None, name=record.folder.resolve().name,
                note=None if stage == "clean" else FINE_TUNED,
            )

        with together(accelerator):
            if accelerator.is_main_process:
                save(model, record.folder / "model", describe)


if __name__ == "__main__":
    main(Config, run, __doc__)
