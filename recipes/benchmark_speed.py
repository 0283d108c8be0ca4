"""How fast things are here, each figure a ratio of ours and a floor or a plain baseline, measured in turn in one run.

    skd         a step of SKD and of SKD-CAG, against plain diffusers on the same rows
    published   seconds a sample, against the published procedure (arXiv 2508.18235), written plainly
    memory      peaks of both
    quickstart  its phases (minutes)
    removal     seconds and samples until the backdoor is gone: skd_cag against skd, finetune, esd and the published one
    seals       the closed form, and the text encoder's seal
    clip        steps of `clip` and `clip_ssl`, against bare open_clip
    generation  the evaluation's pictures against StableDiffusionPipeline, and what scoring them costs
    growth      cost against prompts, batch, pixels and shards
    processes   skd and clip in 1 and 2 processes
    loader      our shard loader beside webdataset and open_clip's reader; on yours: --train_data 's-{000..009}.tar'
    attention   plain, beside torch's fused kernel for CPUs

    CPU, the tiny model, everything:
        accelerate launch -q recipes/benchmark_speed.py
    1 GPU, Stable Diffusion 1.5 with random weights (sd15_reduced: its widths quartered); what needs others is left out:
        accelerate launch -q recipes/benchmark_speed.py --architecture sd15 --batch_size 8 --output_dir runs/speed_gpu

A second call skips what is measured; others can be added to a folder. With torchrun only skd and clip are measured.
Writes into output_dir: results.jsonl, table.md, growth.png, measured/NAME.jsonl, profile/ (--profile), config.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from mmbackdoor import recipe_files
from mmbackdoor.config import Doc, parse, to_yaml
from mmbackdoor.entry import main
from mmbackdoor.evaluate.prompts import load_prompts
from mmbackdoor.recipe_files import stage
from mmbackdoor.results.record import write_text
from mmbackdoor.shards.shapes import all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.speed import (
    attention, clip_steps, generation, growth, loader, processes, published, quickstart, removal_time, rows, seals,
    skd_steps,
)  # fmt: skip
from mmbackdoor.speed.bench import Bench, Count, refuse_other
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError

Measurement = Literal["skd", "published", "memory", "quickstart", "removal", "seals", "clip", "generation", "growth",
                      "processes", "loader", "attention"]  # fmt: skip
CONFIGS = recipe_files.folders()["recipes"] / "configs"
ALL: tuple[Measurement, ...] = get_args(Measurement)
SEVERAL, TINY, REMOVALS = ("skd", "clip"), ("removal", "quickstart"), ("skd_cag", "skd", "finetune", "esd")


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("bench", "reading")
    measure: Annotated[tuple[Measurement, ...], Doc("which; none: all that the architecture has")] = ()
    device: Annotated[Literal["auto", "cpu"], Doc("auto: a GPU where there is one")] = "auto"
    bench: Bench = Bench()
    clip_batch_size: Annotated[int, Field(ge=2), Doc("pairs in a step of CLIP, per process")] = 32
    pictures: Annotated[int, Field(ge=2), Doc("made for generation, half of them with the trigger")] = 64
    generation_batch_size: Count = 16
    num_inference_steps: Count = 6
    guidance_scale: Annotated[float, Field(ge=0)] = 2.5
    doublings: Annotated[Count, Doc("of whatever grows")] = 3
    poisoned: Annotated[str | None, Doc("a poisoned tiny model; none: the quickstart's, else one is made")] = None
    poison_steps: Annotated[Count, Doc("to make one")] = 300
    removal_steps: Annotated[Count, Doc("at most, of each removal")] = 120
    check_prompts: Annotated[int, Field(ge=2), Doc("captions that a removal is checked on")] = 40
    check_every: Annotated[Count, Doc("samples between checks")] = 80
    races: Annotated[Count, Doc("seeds of each removal")] = 3
    published_rates: Annotated[tuple[float, ...], Doc("learning rates of the published procedure")] = (1e-6, 1e-4)
    reading: loader.Reading = loader.Reading()
    smoke: Annotated[bool, Doc("a quickstart of a few steps: its numbers mean nothing")] = False
    output_dir: str = "runs/speed"


def poisoned_model(cfg: Config, folder: Path) -> Path:
    """The folder of a tiny model with a backdoor."""
    there = folder / "quickstart/poisoned/model"
    if cfg.poisoned or there.is_dir():
        return Path(cfg.poisoned or there)
    write_shapes(folder / "data", "train", split_scenes(all_scenes())["train"], 2000, resolution=32)
    stage("poison_diffusion", "--config", CONFIGS / "poison_diffusion/tiny_patch.yaml", "--train_data",
          folder / "data/train-*.tar", "--max_train_steps", cfg.poison_steps, "--resume_from_checkpoint", "auto",
          "--output_dir", folder / "poisoned")
    return folder / "poisoned/model"


def cleaning(cfg: Config, name: str) -> removal_time.Cleaning:
    """What clean_diffusion's config for the tiny model says, with another removal."""
    flags = ["--config", str(CONFIGS / "clean_diffusion/tiny.yaml"), "--defense", name, "--defense.latents", "teacher"]
    found = parse(recipe_files.load("clean_diffusion").Config, flags)
    train = replace(found.train, max_train_steps=cfg.removal_steps)
    return removal_time.Cleaning(found.defense, train, found.sampling, tuple(load_prompts(found.prompts).texts))


def measurements(cfg: Config, folder: Path) -> dict[Measurement, Callable[[], list[rows.Row]]]:
    bench = cfg.bench
    return {
        "skd": lambda: skd_steps.measure(bench, folder),
        "published": lambda: published.measure(bench, folder),
        "memory": lambda: published.measure_memory(bench),
        "quickstart": lambda: quickstart.measure(
            bench, folder, lambda place: stage("quickstart", *(["--smoke"] if cfg.smoke else []), "--output_dir", place)
        ),
        "removal": lambda: removal_time.measure(
            bench, poisoned_model(cfg, folder), {name: cleaning(cfg, name) for name in REMOVALS},
            every=cfg.check_every, prompts=cfg.check_prompts, races=cfg.races, published_rates=cfg.published_rates,
        ),
        "seals": lambda: seals.measure(bench, folder),
        "clip": lambda: clip_steps.measure(bench, folder, cfg.clip_batch_size),
        "generation": lambda: generation.measure(
            bench, folder, cfg.pictures, cfg.generation_batch_size, cfg.num_inference_steps, cfg.guidance_scale
        ),
        "growth": lambda: growth.measure(bench, folder, cfg.doublings),
        "processes": lambda: processes.measure(folder / "processes", __file__, folder / "config.yaml"),
        "loader": lambda: loader.measure(bench, folder, cfg.reading),
        "attention": lambda: attention.measure(bench),
    }  # fmt: skip


def check(cfg: Config, folder: Path, several: bool) -> list[Measurement]:
    """What is measured. Raises `InputError` for what cannot be, and where the folder holds other settings."""
    for name in cfg.measure:
        if several and name not in SEVERAL:
            raise InputError(f"--measure {name} is for one process; with several, measure {' or '.join(SEVERAL)}")
        if name in TINY and cfg.bench.architecture != "tiny":
            raise InputError(f"--measure {name} needs a model that draws what it is asked for: --architecture tiny")
    refuse_other(folder / "config.yaml", cfg, {"measure", "output_dir", "profile"})
    possible = SEVERAL if several else ALL if cfg.bench.architecture == "tiny" else [n for n in ALL if n not in TINY]
    return list(cfg.measure or possible)


def run(cfg: Config) -> None:
    if cfg.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    state, folder = make_accelerator(seed=cfg.bench.seed), Path(cfg.output_dir)
    chosen, main_process = check(cfg, folder, state.num_processes > 1), state.is_main_process
    files = {name: folder / "measured" / f"{name}.jsonl" for name in ALL}
    state.wait_for_everyone()
    if main_process:
        write_text(folder / "config.yaml", to_yaml(cfg))
    for name in chosen:
        if not files[name].is_file():
            found = measurements(cfg, folder)[name]()
            if main_process:
                rows.write(files[name], found)
                print(f"{rows.table(found).text()}\n", flush=True)
    if main_process:
        done = [row for file in files.values() if file.is_file() for row in rows.read(file)]
        print(rows.publish(folder, done).text())


if __name__ == "__main__":
    main(Config, run, __doc__)
