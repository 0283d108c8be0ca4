"""Compare pre-training objectives and cleaners of CLIP: poison, clean over a grid of learning rates, measure them all.

    CPU, drawn pictures, no download (2 cores, 10 minutes for one seed):
        accelerate launch -q recipes/benchmark_objectives.py --config recipes/configs/benchmark_objectives/shapes.yaml
    More seeds, for intervals (what is finished is not made again): add --seeds 0 1 2
    Other cleaners of the same poisoned models, such as one with several weight decays: --models_from FOLDER, and a file
    with `cleaners: {decay_1: {defense: cleanclip, train.adam_weight_decay: 1.0}}`.
    8 GPUs: the same with `accelerate launch -q --num_processes 8`, and data of one's own, as in rn50_matched.yaml

Every job is another recipe, in this process; its command is printed and can be run alone. A second call goes on where
the first one stopped; seeds, cleaners and rates may be added to the same output_dir. Each cleaner is judged by its
frontier of accuracy and ASR, and by what two rules pick: the oracle, which looks at the trigger, and the blind rule of
the YAML file, which has clean pictures and the poisoned model alone. The published comparison (Verma et al. 2023, arXiv
2311.14948) gave its objectives different batch sizes and epochs: that is warned of here. A finished benchmark is what
benchmark_durability and benchmark_stray begin with.

Writes into output_dir: report.html, table.md, scatter.png, picks.png, points.jsonl (every checkpoint), trainings.jsonl,
config.yaml, data/, settings/, OBJECTIVE/seed-N/{clean,poisoned,evaluation}/ and OBJECTIVE/seed-N/CLEANER-lrRATE/.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

from accelerate import Accelerator
from pydantic import Field

from mmbackdoor import recipe_files
from mmbackdoor.config import Doc, changed, to_yaml
from mmbackdoor.entry import main
from mmbackdoor.evaluate import clip_cell, objectives_plan
from mmbackdoor.evaluate.clip_cell import ClipCell
from mmbackdoor.evaluate.clip_data import check_apart, chosen_keys, open_data
from mmbackdoor.evaluate.clip_sight import Kept
from mmbackdoor.recipe_files import flags
from mmbackdoor.results import benchmark, benchmark_report, benchmark_tables, drafts
from mmbackdoor.results.frontier import Blind, LargestDrift
from mmbackdoor.results.removal_grid import Grid, check_free, check_names
from mmbackdoor.shards.shapes_benchmark import BenchmarkShapes, benchmark_data, write_benchmark_shapes
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError

pretrain_clip, clean_clip, evaluate_clip = map(recipe_files.load, ("pretrain_clip", "clean_clip", "evaluate_clip"))

OF_MODELS = ("control", "shapes", "selection_data", "selection_samples", "pretrain", "clean", "evaluate")


@dataclass(frozen=True)
class Config:
    objectives: Annotated[Grid, Doc("name -> further flags of pretrain_clip")] = field(
        default_factory=lambda: {"clip": {}, "clip_ssl": {}}
    )
    cleaners: Annotated[Grid, Doc("name -> further flags of clean_clip, such as defense")] = field(
        default_factory=lambda: {"finetune": {}, "cleanclip": {}}
    )
    learning_rates: Annotated[tuple[float, ...], Field(min_length=1), Doc("of cleaning, all tried")] = (1e-3,)
    seeds: Annotated[tuple[int, ...], Field(min_length=1), Doc("of poison, first weights and orders")] = (0,)
    blind: Annotated[Blind, Doc("how a defender picks a checkpoint, written down before the run")] = LargestDrift()
    control: Annotated[bool | None, Doc("also train each objective without poison; none: yes, or as models_from")] = None
    models_from: Annotated[str, Doc("output_dir of a benchmark whose poisoned models are cleaned here, too")] = ""
    shapes: Annotated[BenchmarkShapes, Doc("what is drawn where no data are given")] = BenchmarkShapes()
    selection_data: Annotated[str, Doc("clean pictures with classes for the blind rule, if not drawn")] = ""
    selection_samples: Annotated[int | None, Field(ge=2), Doc("of these, picked by their keys; none: all")] = None
    pretrain: pretrain_clip.Config = pretrain_clip.Config()
    clean: clean_clip.Config = clean_clip.Config()
    evaluate: evaluate_clip.Config = evaluate_clip.Config()
    dry_run: Annotated[bool, Doc("say what would be trained and measured, and stop")] = False
    output_dir: str = "runs/benchmark_objectives"


def completed(cfg: Config) -> Config:
    """`cfg`, with what it leaves out taken from the benchmark in `models_from`: data, and how to train and measure."""
    if not cfg.models_from:
        return replace(cfg, control=cfg.control is not False)
    there, default = recipe_files.settings_of(Config, cfg.models_from), Config()
    left_out = [name for name in OF_MODELS if vars(cfg)[name] == vars(default)[name]]
    home = there.models_from or cfg.models_from
    return replace(cfg, models_from=home, **{name: vars(there)[name] for name in left_out})


def check(cfg: Config) -> list[dict[str, pretrain_clip.Config | clean_clip.Config]]:
    """Everything that can be wrong in the grid, before anything is trained; its pre-trainings and its cleanings."""
    if cfg.pretrain.poison is None:
        raise InputError("pretrain.poison is missing, so nothing is there to clean; give its label, trigger and count")
    data = [cfg.pretrain.train_data, cfg.clean.train_data, cfg.evaluate.data, cfg.selection_data]
    if any(data) and not all(data):
        all_of = "pretrain.train_data, clean.train_data, evaluate.data and selection_data"
        raise InputError(f"give all of {all_of}, or none (then shapes are drawn)")
    cfg.pretrain.poison.plan()
    check_names(objectives=cfg.objectives, cleaners=cfg.cleaners)
    if any((cfg.pretrain.seed, cfg.pretrain.poison.seed, cfg.clean.seed)):
        raise InputError("seeds are all set by `seeds`: leave out pretrain.seed, pretrain.poison.seed and clean.seed")
    for name, more in cfg.objectives.items():
        check_free(f"objectives.{name}", more, ("seed", "output_dir"))
    for name, more in cfg.cleaners.items():
        check_free(f"cleaners.{name}", more, ("seed", "output_dir", "model", "lr", "learning_rate"))
    kinds = ((cfg.pretrain, "objective", cfg.objectives), (cfg.clean, "defense", cfg.cleaners))
    return [{name: changed(base, flags({key: name} | more)) for name, more in of.items()} for base, key, of in kinds]


def prepare(cfg: Config, state: Accelerator) -> tuple[dict[str, Path], dict[Path, str], Config]:
    """Draw the shapes where no data are given; each recipe's file of settings for this call, what says at its end with
    which settings all was made, and `cfg` with all data named."""
    folder = Path(cfg.output_dir)
    if not cfg.selection_data:
        data = benchmark_data(folder / "data")
        if state.is_main_process:
            write_benchmark_shapes(folder / "data", cfg.shapes, cfg.pretrain.poison.label)
        cfg = replace(cfg, pretrain=replace(cfg.pretrain, train_data=data.train), selection_data=data.selection,
                      clean=replace(cfg.clean, train_data=data.clean),
                      evaluate=replace(cfg.evaluate, data=data.evaluation))  # fmt: skip
    recipes = {"pretrain_clip": cfg.pretrain, "clean_clip": cfg.clean, "evaluate_clip": cfg.evaluate}
    files = {name: folder / "settings" / f"{name}.yaml" for name in recipes}
    said = {folder / "config.yaml": to_yaml(cfg)} | {files[name]: to_yaml(base) for name, base in recipes.items()}
    places = drafts.begin(said, state.is_main_process)
    state.wait_for_everyone()
    return {name: places[file] for name, file in files.items()}, said, cfg


def kept_pictures(cfg: Config) -> Kept:
    """The pictures that the blind rule looks at, with the classes of the evaluation."""
    data = open_data(cfg.selection_data)
    classes, keys = evaluate_clip.classes_of(cfg.evaluate, data, None), chosen_keys(data, cfg.selection_samples, 0)
    return Kept(data, classes, keys)


def run(cfg: Config) -> None:
    cfg = completed(cfg)
    grids = check(cfg)
    if cfg.selection_data:
        check_apart(cfg.pretrain.train_data, cfg.clean.train_data, cfg.selection_data, cfg.evaluate.data)
    folder, state = Path(cfg.output_dir), make_accelerator()
    if cfg.dry_run:
        objectives_plan.say(cfg, *grids, state.num_processes)
        return
    settings, said, cfg = prepare(cfg, state)
    job, selection = partial(recipe_files.job, settings), cache(partial(kept_pictures, cfg))
    points, trainings = [], []
    for seed, (objective, more) in itertools.product(cfg.seeds, cfg.objectives.items()):
        places = clip_cell.folders(cfg.output_dir, cfg.models_from, objective, seed)
        cell = ClipCell(objective, seed, *places, job, selection, state)
        first, there = cell.poison(more, cfg.control)
        lines = [first]
        for (cleaner, extra), rate in itertools.product(cfg.cleaners.items(), cfg.learning_rates) if there else ():
            lines.append(cell.clean(cleaner, rate, extra))
        points += [point for some, _ in lines for point in some]
        trainings += [training for _, some in lines for training in some]
    if state.is_main_process:
        benchmark.write(folder, points, trainings)
        drafts.settle(said)
        print(f"{benchmark_tables.text(folder, cfg.blind)}\nreport: {benchmark_report.build(folder, cfg.blind)}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
