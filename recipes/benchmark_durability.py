"""See whether a backdoor comes back to a cleaned CLIP: fine-tune what a benchmark's blind rule picked, and measure it.

Each checkpoint that was picked in a finished benchmark_objectives is fine-tuned as a later owner would: on clean pairs
alone (0 poisoned ones), and with a few poisoned pairs among them. The model that never was poisoned gets the same ones:
a backdoor that is gone is learned anew no faster than there.

    CPU, on the models of recipes/configs/benchmark_objectives/shapes.yaml (2 cores, a few minutes):
        accelerate launch -q recipes/benchmark_durability.py --config recipes/configs/benchmark_durability/shapes.yaml
    1 GPU, on a benchmark of your own:
        accelerate launch -q recipes/benchmark_durability.py --benchmark runs/benchmark_objectives --steps 100 \\
            --poison_pairs 0 1 5 25 --output_dir runs/benchmark_durability
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

Every job is another recipe, in this process; its command is printed and can be run alone. Settings, data and seeds are
those of the benchmark. A second call goes on where the first one stopped; cleaners and numbers of pairs may be added.

Writes into output_dir: report.html, table.md, durability.png, durability.jsonl (every model), config.yaml,
OBJECTIVE/seed-N/MODEL/pairs-K/.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import FILE_NAME
from mmbackdoor.config import Doc, parse, to_yaml
from mmbackdoor.entry import main
from mmbackdoor.evaluate import clip_cell
from mmbackdoor.evaluate.clip_lasting import lasting
from mmbackdoor.poison_clip import chosen_keys
from mmbackdoor.recipe_files import flags
from mmbackdoor.results import benchmark, durability
from mmbackdoor.results.benchmark import Measured
from mmbackdoor.results.record import write_text
from mmbackdoor.results.removal_grid import Overrides, check_free
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError

objectives, pretrain_clip = map(recipe_files.load, ("benchmark_objectives", "pretrain_clip"))
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    benchmark: Annotated[str, Doc("output_dir of a finished benchmark_objectives, with control")] = ""
    cleaners: Annotated[tuple[str, ...], Doc("of the benchmark; none: all")] = ()
    poison_pairs: Annotated[tuple[Count, ...], Field(min_length=1), Doc("among clean ones, a model for each")] = (
        0, 1, 5, 25
    )  # fmt: skip
    steps: Annotated[int, Field(ge=1), Doc("of fine-tuning, at the rate of the pre-training")] = 100
    finetune: Annotated[Overrides, Doc("flags of pretrain_clip for it, on top of the benchmark's")] = field(
        default_factory=lambda: {"objective": "clip", "lr_scheduler": "cosine", "lr_warmup_steps": 10}
    )
    output_dir: str = "runs/benchmark_durability"


def base(cfg: Config) -> list[str]:
    return ["--config", str(Path(cfg.benchmark) / "settings" / "pretrain_clip.yaml")]


def wanted(cfg: Config, found: objectives.Config, pairs: int, objective: str, seed: int) -> Overrides:
    """The flags of pretrain_clip for a fine-tuning; its rate is the one that this objective was trained with."""
    trained = parse(pretrain_clip.Config, [*base(cfg), *flags({"objective": objective} | found.objectives[objective])])
    poison = {"poison.count": pairs, "poison.rate": None, "poison.seed": seed} if pairs else {"poison": None}
    data = {"train_data": found.clean.train_data, "num_samples": None, "pretrained": None}
    given = {"learning_rate": trained.train.learning_rate} | cfg.finetune | {"max_train_steps": cfg.steps}
    return clip_cell.RESUME | data | poison | given | {"seed": seed}


def check(cfg: Config) -> tuple[objectives.Config, list[tuple[Measured, Path]]]:
    """The settings of the benchmark, and what is fine-tuned. All that can be wrong, before anything is trained."""
    if not cfg.benchmark:
        raise InputError("which benchmark? Give --benchmark with the output_dir of a finished benchmark_objectives")
    home = Path(cfg.benchmark)
    found = recipe_files.settings_of(objectives.Config, cfg.benchmark)
    points, trainings = benchmark.read(home)
    benchmark.check_whole(cfg.benchmark, points, trainings, found.objectives, found.seeds)
    known = list(dict.fromkeys(one.cleaner for one in points if one.cleaner))
    for name in cfg.cleaners:
        if name not in known:
            raise InputError(f"--cleaners {name!r} is none of {cfg.benchmark!r}; choose from {', '.join(known)}")
    check_free("finetune", cfg.finetune, ("seed", "max_train_steps", "output_dir"))
    controls = {(one.objective, one.seed) for one in points if one.stage == "clean"}
    if any((one.objective, one.seed) not in controls for one in points):
        raise InputError(f"{cfg.benchmark!r} lacks the models that never were poisoned; run it with --control true")
    for pairs in cfg.poison_pairs:
        flat = flags(wanted(cfg, found, pairs, points[0].objective, 0))
        train = parse(pretrain_clip.Config, [*base(cfg), *flat]).train
        if train.lr_warmup_steps >= cfg.steps:
            raise InputError(
                f"a warm-up of {train.lr_warmup_steps} steps in {cfg.steps} never comes to the learning rate; lower "
                "finetune.lr_warmup_steps or raise --steps"
            )
    if most := max(cfg.poison_pairs):
        chosen_keys(replace(found.pretrain.poison, rate=None, count=most).plan(), found.clean.train_data)
    picks = [one for one in benchmark.picked(points, found.blind) if not cfg.cleaners or one.cleaner in cfg.cleaners]
    models = [one for one in points if one.stage == "clean"] + picks
    places = [clip_cell.folders(cfg.benchmark, found.models_from, one.objective, one.seed) for one in models]
    return found, [(one, clip_cell.model_of(one, *of)) for one, of in zip(models, places, strict=True)]


def run(cfg: Config) -> None:
    found, models = check(cfg)
    folder, home, state = Path(cfg.output_dir), Path(cfg.benchmark), make_accelerator()
    job = partial(
        recipe_files.job, {name: home / "settings" / f"{name}.yaml" for name in ("pretrain_clip", "evaluate_clip")}
    )
    if state.is_main_process:
        write_text(folder / "config.yaml", to_yaml(cfg))
    lines = []
    for one, model in models:
        settings = {k: wanted(cfg, found, k, one.objective, one.seed) for k in sorted(set(cfg.poison_pairs))}
        start, place = clip_cell.folders(cfg.output_dir, found.models_from or cfg.benchmark, one.objective, one.seed)
        backdoor, target = start / "poisoned" / "model" / FILE_NAME, place / (one.cleaner or "clean")
        lines += lasting(one, model, backdoor, target, settings, job, state.is_main_process)
    if state.is_main_process:
        durability.write(folder, lines)
        for title, table in durability.tables(lines).items():
            print(f"\n{title}\n\n{table.text()}")
        print("\n".join(["", *durability.warnings(lines)]))
        print(f"report: {durability.build(folder)}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
