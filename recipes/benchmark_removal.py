"""Compare removals of backdoors from text-to-image models: attacks x removals x seeds, from one YAML file.

    CPU, the tiny model, drawn pictures, no download:
        accelerate launch -q recipes/benchmark_removal.py --config recipes/configs/benchmark_removal/tiny.yaml
    8 GPUs: the same with `accelerate launch -q --num_processes 8`; model, train_data, prompts of one's own in the file.

Every job is another recipe, in this process; its command is printed and can be run alone. A second call goes on where
the first one stopped; seeds, attacks and removals may be added. The poisoned model (`none`) and the one that never was
(`clean`) are always rows. With `tuning`, each removal gets as many trials, measured on selection prompts and seeds of
their own, and a rule of the file, which looks at ASR (an oracle), picks those that meet the evaluation prompts.

Writes into output_dir: report.html, table.md, curves.png, points.jsonl (every number), comparisons.jsonl (`against`),
runs.jsonl, tuning.jsonl, config.yaml, data/, ATTACK/seed-N/{poisoned,latents,evaluation,REMOVAL}/, tuning/ likewise.
The page, the table and the picture are made anew from these lines by `mmbackdoor report OUTPUT_DIR`. A finished cell
leaves ATTACK/seed-N/scores.json.gz: cells may be run on several machines, and these files and tuning/ brought together.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from mmbackdoor import recipe_files
from mmbackdoor.config import Doc, parse, to_yaml
from mmbackdoor.defenses import ClosedFormSeal
from mmbackdoor.entry import main
from mmbackdoor.evaluate import removal_scores as scores
from mmbackdoor.evaluate.prompts import Suite
from mmbackdoor.evaluate.removal_cell import Cell, measured, tuned
from mmbackdoor.evaluate.removal_comparison import comparisons
from mmbackdoor.evaluate.removal_material import Material, Split, prompts_file
from mmbackdoor.evaluate.removal_points import points
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.recipe_files import stage_of, words
from mmbackdoor.results import drafts, removal_benchmark, removal_comparison, removal_report, removal_tuning
from mmbackdoor.results.removal_grid import Attack, Durability, Grid, Overrides, check_names
from mmbackdoor.results.removal_tuning import Tuning
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError

RECIPES = ("poison_diffusion", "clean_diffusion", "evaluate_diffusion", "train_diffusion")
CONFIGS = {name: recipe_files.load(name).Config for name in RECIPES}


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("material",)

    attacks: Annotated[Grid, Doc("name -> flags of poison_diffusion; removal.KEY, evaluate.KEY, prompts_with, tuned")]
    removals: Annotated[Grid, Doc("name -> flags of clean_diffusion, such as config: NAME and defense: NAME")]
    model: Annotated[str, Doc("the clean model: tiny, a folder, a hub id")] = "tiny"
    material: Material = Material()
    seeds: Annotated[tuple[int, ...], Field(min_length=1), Doc("of poisoning, removal and evaluation")] = (0,)
    milestones: Annotated[tuple[PositiveInt, ...], Doc("steps after which a removal is measured, beside its end")] = ()
    against: Annotated[dict[str, str], Doc("removal -> the one it is compared with")] = field(default_factory=dict)
    tuning: Tuning | None = None
    stress: Annotated[dict[str, Overrides], Doc("name -> flags of sampling, for the last models")] = field(
        default_factory=dict
    )
    durability: Durability | None = None
    evaluate: Annotated[Overrides, Doc("flags of evaluate_diffusion")] = field(default_factory=dict)
    output_dir: str = "runs/benchmark_removal"


def steps(settings: Overrides) -> int:
    """How long a removal with `settings` is. Raises `InputError` for settings that are none, or without a length."""
    found = parse(CONFIGS["clean_diffusion"], words("clean_diffusion", settings))
    length = 0 if isinstance(found.defense, ClosedFormSeal) else found.train.max_train_steps
    if length is None:
        raise InputError(f"the removal {settings} has no max_train_steps, so no milestones; give it one")
    return length


def of_removal(cfg: Config, attack: Attack, removal: str, trial: Overrides) -> Overrides:
    """A removal's settings: its line of the grid, what the attack asks for, and a trial's on top."""
    return cfg.removals[removal] | attack.removal | trial


def check(cfg: Config) -> tuple[dict[str, Attack], dict[tuple[str, Split], Suite]]:
    """Everything that can be wrong in the grid, before anything is trained; the attacks, and the prompts of each."""
    check_names(attacks=cfg.attacks, removals=cfg.removals, stress=cfg.stress)
    for name in {*cfg.against, *cfg.against.values()} - {*cfg.removals}:
        raise InputError(f"against names {name!r}, which is none of the removals {', '.join(cfg.removals)}")
    attacks = {name: Attack.of(name, given) for name, given in cfg.attacks.items()}
    if cfg.tuning:
        cfg.tuning.check(list(cfg.removals), cfg.seeds, [name for name, one in attacks.items() if one.tuned])
    durability, sources = cfg.durability or Durability(), []
    for attack in attacks.values():
        for more in ({}, *(durability.relearn | {"poison_pairs": count} for count in durability.relearn_pairs)):
            parse(CONFIGS["poison_diffusion"], words("poison_diffusion", attack.poison | more))
        for sampling in ({}, *cfg.stress.values()):
            given = cfg.evaluate | attack.evaluate | sampling
            parse(CONFIGS["evaluate_diffusion"], words("evaluate_diffusion", given))
        for removal in cfg.removals:
            for trial in cfg.tuning.trials[removal] if cfg.tuning else ({},):
                settings = of_removal(cfg, attack, removal, trial)
                steps(settings)
                sources.append(parse(CONFIGS["clean_diffusion"], words("clean_diffusion", settings)).prompts)
    parse(CONFIGS["train_diffusion"], words("train_diffusion", durability.benign))
    return attacks, cfg.material.suites(attacks, cfg.tuning is not None, list(dict.fromkeys(sources)))


def run(cfg: Config) -> None:
    attacks, suites = check(cfg)
    folder, state = Path(cfg.output_dir), make_accelerator()
    data, said = folder / "data", {folder / "config.yaml": to_yaml(cfg)}
    if state.is_main_process:
        cfg.material.write(data, suites)
        drafts.begin(said, True)
    state.wait_for_everyone()

    def settings(one: Cell, removal: str, trial: Overrides) -> Overrides:
        return of_removal(cfg, one.attack, removal, trial)

    def cell(name: str, seed: int, root: Path, split: Split) -> Cell:
        place, prompts = root / name / f"seed-{seed}", prompts_file(data, name, split)
        given = cfg.material.settings(data, name) | {"evaluate_diffusion": cfg.evaluate}
        return Cell(name, attacks[name], seed, place, cfg.model, prompts, given, stage_of, steps)

    def asked(one: Cell) -> dict[str, scores.Asked]:
        """All that decides what the cell finds: what its removals share, and each of them."""
        grid = [asdict(part) for part in (one.attack, cfg.material, cfg.durability or Durability())]
        grid += [sha256_at(cfg.model) or cfg.model, cfg.milestones, cfg.stress, one.prompts.read_text(encoding="utf-8")]
        stages = {"poison_diffusion": one.attack.poison, "evaluate_diffusion": cfg.evaluate | one.attack.evaluate}
        shared = {name: scores.Asked.of(parse(CONFIGS[name], words(name, given))) for name, given in stages.items()}
        each = {name: words("clean_diffusion", settings(one, name, trial)) for name, (_, trial) in winners.items()}
        removals = {name: scores.Asked.of(parse(CONFIGS["clean_diffusion"], given)) for name, given in each.items()}
        return {"grid": scores.Asked(grid)} | shared | removals

    found, runs = [], []
    winners = {name: (name, {}) for name in cfg.removals}
    if cfg.tuning:
        names = [name for name, one in attacks.items() if one.tuned]
        cells = [cell(*of, folder / "tuning", "selection") for of in itertools.product(names, cfg.tuning.seeds)]
        trials, runs = tuned(cells, cfg.tuning, settings, cfg.milestones)
        winners = {one.removal: (f"{one.removal}-trial-{one.trial}", one.settings) for one in trials if one.winner}
        if state.is_main_process:
            removal_tuning.write(folder, trials)
    for seed, name in itertools.product(cfg.seeds, attacks):
        one = cell(name, seed, folder, "evaluation")
        kept = scores.read(one.folder, asked(one))
        some, lines = kept or measured(one, winners, settings, cfg.milestones, cfg.stress, cfg.durability)
        if state.is_main_process and not kept:
            scores.write(one.folder, asked(one), some, lines)
        found, runs = found + some, runs + lines
    if state.is_main_process:
        removal_benchmark.write(folder, points(found), runs)
        removal_comparison.write(folder, comparisons(found, cfg.against))
        drafts.settle(said)
        print(removal_report.text(folder))
        print(f"report: {removal_report.build(folder)}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)
