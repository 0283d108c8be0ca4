"""Train the autoencoder of a latent diffusion model on shards: a small one from scratch, or one that you have.

A variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114) as in latent diffusion (Rombach et al. 2022, arXiv
2112.10752): reconstruction error + kl_weight * KL. `scaling_factor` in its config becomes 1 / standard deviation of
the latents, so a diffusion model that was trained on the old latents has to be trained anew.

    CPU, the autoencoder of the small text-to-image model (one core, half an hour):
        python data/build_shapes.py --scenes pairs --resolution 64 --output_dir pairs
        accelerate launch -q recipes/train_autoencoder.py --config recipes/configs/train_autoencoder/small.yaml \\
            --train_data 'pairs/train-*.tar' --output_dir runs/autoencoder
    1 GPU:
        accelerate launch -q recipes/train_autoencoder.py --pretrained_model_name_or_path FOLDER --resolution 256 \\
            --train_data 'shards-{000000..000099}.tar' --learning_rate 1e-5 --mixed_precision bf16 --use_ema
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Writes into output_dir: model/ (`diffusers.AutoencoderKL.from_pretrained` and `train_diffusion --autoencoder` load it),
config.yaml, run.json, results.jsonl (PSNR and the latents' standard deviation), train.jsonl, checkpoint-*/.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.models.autoencoder import (
    Reconstructor,
    latent_shape,
    load_autoencoder,
    save_autoencoder,
    small_autoencoder,
)
from mmbackdoor.models.weight_files import sha256_at, weights_sha256
from mmbackdoor.objectives.autoencoder import Reconstruction
from mmbackdoor.results.cards import write_card
from mmbackdoor.results.record import FILE_NAME, Record
from mmbackdoor.results.record import replace as write_records
from mmbackdoor.results.run import Run
from mmbackdoor.train.autoencoder import autoencoder_step, measure
from mmbackdoor.train.batches import Share, image_batches, open_shards
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.train.session import Session, is_done, made_from
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    pretrained_model_name_or_path: Annotated[
        str | None, Doc("folder of an AutoencoderKL, or of a pipeline with vae/, to go on from")
    ] = None
    from_scratch: Annotated[Literal["small"] | None, Doc("make this architecture anew instead")] = None
    resolution: Annotated[int | None, Field(ge=1), Doc("pixels; by default those of the autoencoder's config")] = None
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions; the captions are not used")] = ""
    validation_data: Annotated[str | None, Doc("shards to measure on; none: those of the training")] = None
    validation_samples: Annotated[int, Field(ge=1), Doc("pictures to measure on, at most")] = 512
    reconstruction: Annotated[Reconstruction, Doc("absolute (l1) or squared (l2) error of a pixel")] = "l2"
    kl_weight: Annotated[float, Field(ge=0), Doc("of the KL divergence from a standard normal distribution")] = 1e-6
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_train_steps=2000, learning_rate=1e-4))
    output_dir: str = "runs/autoencoder"
    seed: int = 0


def make_autoencoder(cfg: Config):
    if (cfg.from_scratch is None) == (cfg.pretrained_model_name_or_path is None):
        raise InputError("which start? Give either --from_scratch small or --pretrained_model_name_or_path FOLDER")
    if cfg.from_scratch:
        return small_autoencoder(cfg.seed)
    return load_autoencoder(cfg.pretrained_model_name_or_path)


def run(cfg: Config) -> None:
    accelerator = make_accelerator(cfg.train, cfg.seed, cfg.output_dir)
    share = Share.of(accelerator, cfg.train)
    loader = open_shards(cfg.train_data, share, cfg.train, cfg.seed)
    alone, whole = Share(share.batch_size), replace(cfg.train, drop_last=False, train_data_upsampling_factors=None)
    validation = open_shards(cfg.validation_data or cfg.train_data, alone, whole, cfg.seed)
    inputs = made_from(loader, model=sha256_at(cfg.pretrained_model_name_or_path))
    with Run.start(cfg, "train_autoencoder", cfg.output_dir, accelerator, inputs) as record:
        if is_done(record, cfg.train):
            return
        autoencoder = make_autoencoder(cfg).to(accelerator.device).requires_grad_(True)
        resolution = cfg.resolution or autoencoder.config.sample_size
        shape = latent_shape(autoencoder, resolution)
        if cfg.train.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        module = Reconstructor(autoencoder)
        steps = total_steps(cfg.train, loader.num_samples, share.global_batch_size)
        parameters = dict(autoencoder.named_parameters())
        session = Session(accelerator, module, parameters, cfg.train, record, steps, loader)
        batches = image_batches(loader, share, resolution, accelerator.device, session.start_step)
        step_fn = autoencoder_step(session.module, shape, cfg.reconstruction, cfg.kl_weight, cfg.seed)
        for step, metrics in session.training(step_fn, batches):
            record.log(step, metrics)
        if accelerator.is_main_process:
            pictures = min(cfg.validation_samples, validation.num_samples)
            held_out = image_batches(validation, alone, resolution, accelerator.device)
            quality = measure(module, held_out, pictures)
            autoencoder.register_to_config(sample_size=resolution, scaling_factor=1 / quality.latent_std)
            numbers = {"psnr": (quality.psnr, "dB"), "latent_std": (quality.latent_std, "1")}
            record.counters |= {name: value for name, (value, _) in numbers.items()}
            record.counters |= {"scaling_factor": 1 / quality.latent_std, "latent_mean": quality.latent_mean}
            data = "validation data" if cfg.validation_data else "training data"

            def describe(folder: Path) -> None:
                made = {"id": record.folder.resolve().name, "sha256": weights_sha256(folder)}
                suite = {"name": data, "sha256": validation.order()["data_sha256"]}
                write_records(record.folder / FILE_NAME, [
                    Record(run_id=record.run_id, stage="clean", model=made, suite=suite, condition="clean", metric=name,
                           value=value, n=pictures, unit=unit, higher_is_better=name == "psnr" or None, seed=cfg.seed)
                    for name, (value, unit) in numbers.items()
                ])  # fmt: skip
                write_card(
                    folder, stage="clean", run=record.content, base_model=cfg.pretrained_model_name_or_path,
                    name=made["id"], pipeline_tag="image-to-image",
                    table=f"On {pictures} pictures of the {data}: PSNR {quality.psnr:.2f} dB; standard deviation of "
                    f"the latents {quality.latent_std:.4f}, so `scaling_factor` is {1 / quality.latent_std:.4f}.",
                )

            save_autoencoder(autoencoder, record.folder / "model", describe)
            print(f"PSNR {quality.psnr:.2f} dB, standard deviation of the latents {quality.latent_std:.4f}", flush=True)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
