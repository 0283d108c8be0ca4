"""One objective with one seed of a benchmark of CLIPs: the jobs that poison and clean it, and the lines they leave.

A job is another recipe; how one is run is handed in, since recipes lie above this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmbackdoor.evaluate.clip_points import SIGHTS, checkpoints, cleaned, look, measured, training
from mmbackdoor.evaluate.clip_sight import Kept
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.results.benchmark import Measured, Training
from mmbackdoor.types import Diverged, InputError

Job = Callable[[str, Mapping[str, Any]], None]
Lines = tuple[list[Measured], list[Training]]
RESUME = {"resume_from_checkpoint": "auto"}


@dataclass(frozen=True)
class ClipCell:
    """`start` is the folder of the model before cleaning and of its control, `folder` the one that cleanings are
    written to. Every process runs the jobs; the main one alone gets lines."""

    objective: str
    seed: int
    start: Path
    folder: Path
    job: Job
    selection: Callable[[], Kept]
    state: Accelerator

    @property
    def poisoned(self) -> Path:
        return self.start / "poisoned" / "model"

    @property
    def control(self) -> Path:
        """The model that never was poisoned, else trained alike."""
        return self.start / "clean" / "model"

    @property
    def facts(self) -> dict[str, Any]:
        return {"objective": self.objective, "seed": self.seed}

    def poison(self, more: Mapping[str, Any], control: bool) -> tuple[Lines, bool]:
        """Train the poisoned model and, if wanted, its control, with further flags of pretrain_clip; measure both.
        Beside the lines, whether there is a model to clean: none where its training diverged."""
        kinds = ("clean", "poisoned") if control else ("poisoned",)
        whole = []
        for kind in kinds:
            poison = {"poison": None} if kind == "clean" else {"poison.seed": self.seed}
            wanted = {"objective": self.objective} | more | poison | {"seed": self.seed}
            try:
                self.job("pretrain_clip", RESUME | wanted | {"output_dir": self.start / kind})
                whole.append(kind)
            except Diverged as fault:
                print(f"{self.start / kind} broke off: {fault}")
        poisoned = "poisoned" in whole
        if poisoned:
            compared = {"control": self.control} if "clean" in whole else {}
            self.job("evaluate_clip", {"model": self.poisoned} | compared | {"output_dir": self.start / "evaluation"})
        if not self.state.is_main_process:
            return ([], []), poisoned
        facts = {kind: self.facts | {"stage": kind} for kind in kinds}
        trainings = [training(self.start / kind, facts[kind]) for kind in kinds]
        if not poisoned:
            return ([], trainings), False
        seen = look(self.poisoned, [self.poisoned], self.selection, self.start / SIGHTS, self.state.device)
        models = [(self.start / kind / "model", facts[kind]) for kind in whole]
        return (measured(self.start / "evaluation", models, seen), trainings), True

    def clean(self, cleaner: str, rate: float, more: Mapping[str, Any]) -> Lines:
        """Clean the poisoned model at one rate, with further flags of clean_clip, and measure every checkpoint."""
        run = cleaning(self.folder, cleaner, rate)
        facts = self.facts | {"stage": "cleaned", "cleaner": cleaner, "learning_rate": rate}
        wanted = {"model": self.poisoned, "defense": cleaner, "lr": rate} | more | {"seed": self.seed}
        try:
            self.job("clean_clip", RESUME | wanted | {"output_dir": run})
        except Diverged as fault:
            # A rate that is too high breaks its run, and that is a result; a full disk is none.
            print(f"{run} broke off: {fault}")
            return [], [training(run, facts)] if self.state.is_main_process else []
        *others, last = [model for _, model in checkpoints(run)]
        compared = {"model": last, "compare": [*others, self.poisoned]}
        self.job("evaluate_clip", compared | {"output_dir": run / "evaluation"})
        if not self.state.is_main_process:
            return [], []
        return cleaned(run, self.poisoned, facts, self.selection, self.state.device), [training(run, facts)]


def folders(benchmark: str, models_from: str, objective: str, seed: int) -> tuple[Path, Path]:
    """`start` and `folder` of a cell of `benchmark` (its folder), whose models before cleaning lie in `models_from`, if
    that is given."""
    place = f"{objective}/seed-{seed}"
    return Path(models_from or benchmark) / place, Path(benchmark) / place


def cleaning(folder: Path, cleaner: str, rate: float) -> Path:
    """Where a cell's `folder` has the cleaning with this rate."""
    return folder / f"{cleaner}-lr{rate:g}"


def model_of(one: Measured, start: Path, folder: Path) -> Path:
    """The model that `one` measured, in the folders of its cell. Raises `InputError` where it is another one by now."""
    model = start / one.stage / "model"
    if one.cleaner is not None and one.learning_rate is not None:
        model = dict(checkpoints(cleaning(folder, one.cleaner, one.learning_rate))).get(one.step, model)
    if not model.is_dir() or weights_sha256(model) != one.sha256:
        raise InputError(
            f"{str(model)!r} is not the model that the benchmark measured (weights {one.sha256[:12]}); run the "
            "benchmark again"
        )
    return model
