"""One attack with one seed of a benchmark of removals: the jobs that it takes, and what they measured.

A job is another recipe; how one is run is handed in, since recipes lie above this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmbackdoor.evaluate.removal_points import Seen, removal_run, seen, steps_of, tuned_trials, utility_of
from mmbackdoor.results.removal_benchmark import CLEAN, NONE, RemovalRun, Where
from mmbackdoor.results.removal_grid import Attack, Durability, Overrides, milestones_of
from mmbackdoor.results.removal_tuning import TunedTrial, Tuning, with_winners
from mmbackdoor.train.milestones import milestone
from mmbackdoor.types import Diverged

Job = Callable[[str, Overrides], None]
Found = tuple[list[Seen], list[RemovalRun]]
"""What was seen, and a line for each removal that was run and for what else broke off."""
QUICK: Overrides = {"near_prompts": 0}


@dataclass(frozen=True)
class Cell:
    """`folder` is where it writes, `model` the clean start, `prompts` the file to measure on. `settings` are those of
    each recipe, `steps` how long a removal with some settings is."""

    name: str
    attack: Attack
    seed: int
    folder: Path
    model: str
    prompts: Path
    settings: Mapping[str, Overrides]
    job: Job
    steps: Callable[[Overrides], int]

    @property
    def poisoned(self) -> Path:
        return self.folder / "poisoned" / "model"

    def poison(self) -> RemovalRun | None:
        """Put the backdoor in. Where that diverges, the line that says so."""
        try:
            self._train("poison_diffusion", self.model, self.poisoned.parent, self.attack.poison)
        except Diverged as fault:
            return self._failed(self.poisoned.parent, NONE, fault)
        return None

    def before(self, stress: Mapping[str, Overrides], control: bool = True, *more: Overrides) -> Found:
        """The poisoned model and, as its `control`, the one that never was; as they are, and under `stress`. Nothing is
        seen where their pictures diverge as they are: nothing could be compared with them."""
        found, lost = [], []
        for name, sampling in [("", {}), *((f"stress:{name}", QUICK | given) for name, given in stress.items())]:
            models = {str(self.poisoned): self._where(NONE, "poisoned", situation=name)}
            if control:
                models[self.model] = self._where(CLEAN, "clean", situation=name)
            place = self.folder / (name.replace(":", "-") or "evaluation")
            try:
                found += self._measure(place, models, sampling, *more)
            except Diverged as fault:
                if not name:
                    return [], [self._failed(self.poisoned.parent, NONE, fault)]
                lost.append(self._lost(place, NONE, name, fault))
        return found, lost

    def clean(
        self, removal: str, settings: Overrides, label: str, milestones: Sequence[int], *more: Overrides
    ) -> tuple[list[Seen], RemovalRun]:
        """Run a removal in the folder `label` and measure it at its milestones and its end: what was seen (nothing,
        where it or its pictures diverged), and the line of its run."""
        run = self.folder / label
        kept = milestones_of(milestones, self.steps(settings))
        asked: Overrides = {"latents_dir": str(self.folder / "latents")} | ({"milestones": kept} if kept else {})
        try:
            self._train("clean_diffusion", self.poisoned, run, settings, asked)
            where = self._where(removal, "cleaned", step=steps_of(run))
            found = self._measure(run / "evaluation", {str(run / "model"): where}, *more)
            if kept:
                on_the_way = {
                    str(milestone(run, step)): self._where(removal, "cleaned", step=step, final=False) for step in kept
                }
                found = self._measure(run / "evaluation-milestones", on_the_way, *more, QUICK) + found
        except Diverged as fault:
            return [], self._failed(run, removal, fault)
        return found, removal_run(run, self.name, removal, self.seed)

    def stressed(self, removal: str, label: str, stress: Mapping[str, Overrides]) -> Found:
        """The cleaned model in `label` under each way to sample."""
        run, found, lost = self.folder / label, [], []
        for name, sampling in stress.items():
            where = self._where(removal, "cleaned", step=steps_of(run), situation=f"stress:{name}")
            place = run / f"stress-{name}"
            try:
                found += self._measure(place, {str(run / "model"): where}, QUICK, sampling)
            except Diverged as fault:
                lost.append(self._lost(place, removal, where.situation, fault))
        return found, lost

    def lasting(self, removal: str, label: str, durability: Durability) -> Found:
        """Whether the backdoor comes back to the cleaned model in `label`, or how fast it comes to the clean one."""
        never = removal == CLEAN
        model = self.model if never else str(self.folder / label / "model")
        step = 0 if never else steps_of(self.folder / label)
        jobs: list[tuple[str, str, str, tuple[Overrides, ...]]] = []
        if durability.benign_steps is not None and not never:
            length: Overrides = {"max_train_steps": durability.benign_steps}
            situation = f"benign:{durability.benign_steps}"
            jobs.append(("train_diffusion", situation, "cleaned", (durability.benign, length)))
        for pairs in durability.relearn_pairs:
            length = {"max_train_steps": durability.relearn_steps, "poison_pairs": pairs}
            settings = (self.attack.poison, durability.relearn, length)
            jobs.append(("poison_diffusion", f"relearn:{pairs}", "poisoned", settings))
        found, lost = [], []
        for recipe, situation, stage, settings in jobs:
            place = self.folder / label / situation.replace(":", "-")
            try:
                self._train(recipe, model, place, *settings)
                where = self._where(removal, stage, step=step, situation=situation)
                found += self._measure(place / "evaluation", {str(place / "model"): where}, QUICK)
            except Diverged as fault:
                lost.append(self._lost(place, removal, situation, fault))
        return found, lost

    def _where(self, removal: str, stage: str, step: int = 0, final: bool = True, situation: str = "") -> Where:
        return Where(
            attack=self.name, removal=removal, stage=stage, step=step, final=final, situation=situation  # type: ignore
        )

    def _train(self, recipe: str, model: str | Path, output_dir: Path, *parts: Overrides) -> None:
        self._run(recipe, *parts, {
            "resume_from_checkpoint": "auto", "pretrained_model_name_or_path": str(model), "seed": self.seed,
            "output_dir": str(output_dir),
        })  # fmt: skip

    def _run(self, recipe: str, *parts: Overrides) -> None:
        given = (self.settings.get(recipe, {}), *parts)
        self.job(recipe, {key: value for part in given for key, value in part.items()})

    def _measure(self, place: Path, models: Mapping[str, Where], *more: Overrides) -> list[Seen]:
        control = {"control": model for model, where in models.items() if where.stage == "clean"}
        first, *others = [model for model, where in models.items() if where.stage != "clean"]
        compared: Overrides = {"compare": tuple(others)} if others else {}
        self._run("evaluate_diffusion", self.attack.evaluate, *more, control, compared, {
            "pretrained_model_name_or_path": first, "prompts": str(self.prompts), "seed": self.seed,
            "output_dir": str(place),
        })  # fmt: skip
        # An evaluation names a model by its stage, with a number from the second on.
        named: dict[str, Where] = {}
        for where in models.values():
            alike = sum(other.stage == where.stage for other in named.values())
            named[f"{where.stage}-{alike + 1}" if alike else where.stage] = where
        return seen(place, named, self.seed)

    def _failed(self, run: Path, removal: str, fault: Diverged) -> RemovalRun:
        print(f"{run} broke off: {fault}")
        return replace(removal_run(run, self.name, removal, self.seed), status="failed", error=str(fault))

    def _lost(self, place: Path, removal: str, situation: str, fault: Diverged | str) -> RemovalRun:
        print(f"{place} broke off: {fault}")
        return RemovalRun(
            attack=self.name, removal=removal, seed=self.seed, status="failed", steps=0, samples=0, seconds=None,
            error=str(fault), situation=situation,
        )  # fmt: skip

    def to_tune(self) -> Found:
        """The poisoned model of a seed of tuning; nothing, and the line that says so, where it diverges."""
        failed = self.poison()
        found, lost = ([], [failed]) if failed else self.before({}, False, QUICK)
        return found, [self._lost(self.folder, NONE, "tuning", str(one.error)) for one in lost]


Settings = Callable[[Cell, str, Overrides], Overrides]
"""The settings of a removal, by its name, in a cell, with a trial's on top."""


def tuned(
    cells: Sequence[Cell], tuning: Tuning, settings: Settings, milestones: Sequence[int]
) -> tuple[list[TunedTrial], list[RemovalRun]]:
    """Every trial of every removal in every one of `cells`, which measure on selection prompts, winners marked; and the
    cells without a poisoned model, in which no removal is tuned. Raises `Diverged` where none is left."""
    poisoned: list[Seen] = []
    whole: list[Cell] = []
    lost: list[RemovalRun] = []
    for cell in cells:
        found, broken = cell.to_tune()
        lost += broken
        if not broken:
            poisoned, whole = poisoned + found, [*whole, cell]
            # What cannot be chosen by is said before anything is cleaned.
            utility_of(poisoned)
    if not whole:
        raise Diverged(f"no model could be poisoned to tune on, the last one because: {lost[-1].error}")
    lines = []
    for removal, trials in tuning.trials.items():
        tried = []
        for number, trial in enumerate(trials):
            found, error = [], None
            for cell in whole:
                some, run = cell.clean(
                    removal, settings(cell, removal, trial), f"{removal}-trial-{number}", milestones, QUICK
                )
                found += some
                if error is None and run.error is not None:
                    error = f"{cell.name}, seed {cell.seed}: {run.error}"
            tried.append((trial, found, error))
        lines += tuned_trials(removal, tried, poisoned, milestones, tuning.rule.conditions)
    return with_winners(lines, tuning.rule), lost


def measured(
    cell: Cell,
    winners: Mapping[str, tuple[str, Overrides]],
    settings: Settings,
    milestones: Sequence[int],
    stress: Mapping[str, Overrides],
    durability: Durability | None,
) -> Found:
    """Everything of one cell: its models before, and each removal of `winners` (name -> folder, settings of the trial
    that won). What diverges is a line, and the rest goes on; without a poisoned model there is nothing to remove."""
    failed = cell.poison()
    if failed is not None:
        return [], [failed]
    found, lines = cell.before(stress)
    if not found:
        return found, lines
    parts: list[Found] = [cell.lasting(CLEAN, CLEAN, durability)] if durability else []
    for removal, (label, trial) in winners.items():
        some, run = cell.clean(removal, settings(cell, removal, trial), label, milestones)
        parts.append((some, [run]))
        if some:
            parts.append(cell.stressed(removal, label, stress))
        if some and durability:
            parts.append(cell.lasting(removal, label, durability))
    for some, more in parts:
        found, lines = found + some, lines + more
    return found, lines
