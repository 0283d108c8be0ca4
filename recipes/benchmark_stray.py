"""Leave a few poisoned pairs among the clean ones that a CLIP is cleaned with, and see what filtering first is worth.

Begins with the poisoned models of a finished benchmark_objectives. Its pairs to clean with get `count` poisoned ones;
each detector says which pairs to leave out; the same cleaner then runs over the same rates on all pairs (`unfiltered`),
on what each filter kept, and, from the benchmark itself, without stray pairs (`no_strays`): as many trials each.

    CPU, on the models of recipes/configs/benchmark_objectives/shapes.yaml (2 cores, ten minutes):
        accelerate launch -q recipes/benchmark_stray.py --config recipes/configs/benchmark_stray/shapes.yaml
    1 GPU, on a benchmark of your own:
        accelerate launch -q recipes/benchmark_stray.py --benchmark runs/benchmark_objectives --cleaner cleanclip \\
            --count 5 --output_dir runs/benchmark_stray
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Every job is another recipe, in this process; its command is printed and can be run alone. Settings, data and seeds are
those of the benchmark. A second call goes on where the first one stopped; filters and rates may be added. Detectors see
pictures and captions alone; which pairs are poisoned is looked up afterwards, to count.

Writes into output_dir: report.html, table.md, stray.png, points.jsonl (every checkpoint), trainings.jsonl,
filters.jsonl, config.yaml, settings/, data/seed-N/, OBJECTIVE/seed-N/{detect-FILTER,FILTER-lrRATE}/.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmbackdoor import recipe_files
from mmbackdoor.config import Doc, parse, to_yaml
from mmbackdoor.entry import main
from mmbackdoor.evaluate import clip_cell
from mmbackdoor.evaluate.clip_cell import ClipCell
from mmbackdoor.poison_clip import chosen_keys
from mmbackdoor.recipe_files import flags
from mmbackdoor.results import benchmark, benchmark_tables, stray
from mmbackdoor.results.record import write_text
from mmbackdoor.results.removal_grid import Grid, check_free, check_names
from mmbackdoor.results.stray import NO_STRAYS, UNFILTERED
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError

objectives, poison_shards, detect = map(recipe_files.load, ("benchmark_objectives", "poison_shards", "detect"))


@dataclass(frozen=True)
class Config:
    benchmark: Annotated[str, Doc("output_dir of a finished benchmark_objectives")] = ""
    cleaner: Annotated[str, Doc("of the benchmark")] = "cleanclip"
    count: Annotated[int, Field(ge=1), Doc("poisoned pairs among the clean ones")] = 5
    filters: Annotated[Grid, Doc("name -> further flags of detect, such as detector and drop_fraction")] = field(
        default_factory=lambda: {"dao": {}, "clip_cosine": {}}
    )
    learning_rates: Annotated[tuple[float, ...], Doc("of cleaning, all tried; none: those of the benchmark")] = ()
    resolution: Annotated[
        int | None, Field(ge=1), Doc("of the models' pictures, for triggers that belong after resize and crop")
    ] = None
    output_dir: str = "runs/benchmark_stray"


def check(cfg: Config) -> tuple[objectives.Config, poison_shards.Config]:
    """The settings of the benchmark and of the shards. Everything that can be wrong, before anything is made."""
    if not cfg.benchmark:
        raise InputError("which benchmark? Give --benchmark with the output_dir of a finished benchmark_objectives")
    found = recipe_files.settings_of(objectives.Config, cfg.benchmark)
    points, trainings = benchmark.read(Path(cfg.benchmark))
    benchmark.check_whole(cfg.benchmark, points, trainings, found.objectives, found.seeds)
    if cfg.cleaner not in found.cleaners:
        known = ", ".join(found.cleaners)
        raise InputError(f"--cleaner {cfg.cleaner!r} is none of {cfg.benchmark!r}; choose from {known}")
    check_names(filters=cfg.filters)
    for name, more in cfg.filters.items():
        if name in (NO_STRAYS, UNFILTERED):
            raise InputError(f"filters has the name {name!r}, which the benchmark uses itself; choose another")
        check_free(f"filters.{name}", more, ("seed", "output_dir", "model", "train_data"))
        parse(detect.Config, flags({"detector": name} | more))
    poison = replace(found.pretrain.poison, rate=None, count=cfg.count)
    shards = poison_shards.Config(poison, found.clean.train_data, cfg.resolution, output_dir=cfg.output_dir)
    chosen_keys(poison.plan(), poison_shards.check(shards))
    for one in points:
        if one.stage == "poisoned":
            clip_cell.model_of(one, *clip_cell.folders(cfg.benchmark, found.models_from, one.objective, one.seed))
    return found, shards


def run(cfg: Config) -> None:
    found, shards = check(cfg)
    folder, home, state = Path(cfg.output_dir), Path(cfg.benchmark), make_accelerator()
    settings = {name: home / "settings" / f"{name}.yaml" for name in ("clean_clip", "evaluate_clip")}
    settings["poison_shards"] = folder / "settings" / "poison_shards.yaml"
    if state.is_main_process:
        write_text(folder / "config.yaml", to_yaml(cfg))
        write_text(settings["poison_shards"], to_yaml(shards))
    state.wait_for_everyone()
    job, selection = partial(recipe_files.job, settings), cache(partial(objectives.kept_pictures, found))
    rates = cfg.learning_rates or found.learning_rates
    points, trainings = stray.without_strays(*benchmark.read(home), cfg.cleaner, rates)
    filters, there = [], {(one.objective, one.seed) for one in points if one.stage == "poisoned"}
    for seed in found.seeds:
        data = folder / "data" / f"seed-{seed}"
        job("poison_shards", {"poison.seed": seed, "output_dir": data})
        # Of several processes one writes them.
        state.wait_for_everyone()
        pairs = {"train_data": f"{data}/*.tar"}
        cleaner = {"defense": cfg.cleaner} | found.cleaners[cfg.cleaner] | pairs
        for objective, name in itertools.product(found.objectives, [UNFILTERED, *cfg.filters]):
            if (objective, seed) not in there:
                continue
            start, _ = clip_cell.folders(cfg.benchmark, found.models_from, objective, seed)
            _, place = clip_cell.folders(cfg.output_dir, "", objective, seed)
            cell = ClipCell(objective, seed, start, place, job, selection, state)
            kept = {}
            if name != UNFILTERED:
                detected = place / f"detect-{name}"
                wanted = {"model": cell.poisoned, "detector": name} | pairs | cfg.filters[name]
                job("detect", wanted | {"seed": seed, "output_dir": detected})
                kept = {"keep_keys": detected / "kept.txt"}
                if state.is_main_process:
                    filters.append(stray.filtered(detected / "detection.json", objective, seed, name))
            for rate in rates:
                some, runs = cell.clean(name, rate, cleaner | kept)
                points, trainings = points + some, trainings + runs
    if state.is_main_process:
        stray.write(folder, points, trainings, filters)
        print(f"\n{stray.filter_table(filters).text()}{benchmark_tables.text(folder, found.blind)}")
        print(f"report: {stray.build(folder, found.blind, found.blind.words)}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
