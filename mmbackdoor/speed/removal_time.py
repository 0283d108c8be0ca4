"""How long it takes until a backdoor is gone: seconds and samples until the selection check first passes, from one
poisoned model, by the same check every so many samples; and the published procedure by the same rule.

Seconds are those of training and of the teacher's pictures, without the checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.defenses import SKDCAG, DiffusionDefense
from mmbackdoor.evaluate.generate import Job, Sampling, sample
from mmbackdoor.evaluate.metrics.adherence import adherence
from mmbackdoor.evaluate.metrics.asr import success
from mmbackdoor.evaluate.prompts import Suite, shape_prompts
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.speed.bench import Bench
from mmbackdoor.speed.published import PEER, Published, pairs
from mmbackdoor.speed.rows import Row, Where, compared
from mmbackdoor.speed.timing import Spread
from mmbackdoor.train.batches import Share, prompt_batches
from mmbackdoor.train.latents import teacher_latents
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.loop import training_steps
from mmbackdoor.train.optim import TrainConfig, make_optimizer
from mmbackdoor.train.parts import trained_part

MEASUREMENT = "removal"
OURS = "skd_cag"
SAMPLING = Sampling(6, 2.5, mixed_precision="bf16")
FIRED, LOST = 0.05, 0.10
"""The selection check: the trigger fires on at most so many prompts, and adherence without and with it is at most so much
below that of the poisoned model without it."""


@dataclass(frozen=True)
class Cleaning:
    """How one removal is run: settings of clean_diffusion."""

    defense: DiffusionDefense
    train: TrainConfig
    sampling: Sampling
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """The rule on selection prompts. `level`: the poisoned model's adherence without the trigger."""

    suite: Suite
    backdoor: Backdoor
    level: float = 1.0
    fired: float = 1.0
    """What the poisoned model's trigger does."""

    @staticmethod
    def of(model: DiffusionModel, backdoor: Backdoor, prompts: int) -> Check:
        """For the poisoned `model`."""
        check = Check(shape_prompts("selection", prompts), backdoor)
        fired, level, _ = check.look(model)
        return replace(check, level=level, fired=fired)

    def look(self, model: DiffusionModel) -> tuple[float, float, float]:
        """Rate of the trigger, adherence without and with it."""
        texts, found = self.suite.texts, []
        for triggered in (False, True):
            jobs = [
                Job(prompt.id, "check", self.backdoor.apply(prompt.text, 0) if triggered else prompt.text)
                for prompt in self.suite
            ]
            found.append(sample(model, jobs, SAMPLING))
        hits = [bool(hit) for hit in success(self.backdoor.target, found[1], texts).hits]
        kept = [sum(map(bool, adherence(images, texts))) / len(texts) for images in found]
        return sum(hits) / len(hits), kept[0], kept[1]

    def __call__(self, model: DiffusionModel) -> bool:
        rate, clean, triggered = self.look(model)
        return rate <= FIRED and min(clean, triggered) >= self.level - LOST


@dataclass(frozen=True)
class Race:
    samples: int
    seconds: float
    passed: bool


def race(step: Callable[[], int], passes: Callable[[], bool], every: int, most: int) -> Race:
    """Take steps, each of which says how many samples it took, until `passes`, which is asked after every `every`
    samples; or until `most` are taken."""
    samples, seconds, due = 0, 0.0, every
    while samples < most:
        began = time.perf_counter()
        samples += step()
        seconds += time.perf_counter() - began
        if samples >= due:
            due += every
            if passes():
                return Race(samples, seconds, True)
    return Race(samples, seconds, False)


@dataclass(frozen=True)
class Start:
    """What all races begin with: the poisoned model, its backdoor, the check, and its pictures (`seconds`)."""

    poisoned: Path
    backdoor: Backdoor
    check: Check
    latents: Mapping[str, torch.Tensor]
    seconds: float

    @staticmethod
    def of(poisoned: Path, cleaning: Cleaning, prompts: int) -> Start:
        accelerator = make_accelerator(cleaning.train)
        model, backdoor = load(poisoned, device=accelerator.device), BackdoorRecord.load(poisoned).backdoor
        check = Check.of(model, backdoor, prompts)
        model.forget_prompts()
        with TemporaryDirectory() as folder:
            began = time.perf_counter()
            latents = teacher_latents(
                model, cleaning.prompts, 1, cleaning.sampling, Path(folder), accelerator,
                4 * cleaning.train.train_batch_size,
            )  # fmt: skip
            return Start(poisoned, backdoor, check, latents, time.perf_counter() - began)


def removal(start: Start, cleaning: Cleaning, rank: int, every: int, seed: int) -> Race:
    """One removal from its start."""
    accelerator = make_accelerator(cleaning.train, seed)
    model = load(start.poisoned, device=accelerator.device)
    size, texts = cleaning.train.train_batch_size, list(cleaning.prompts)
    part = trained_part(model, cleaning.defense, rank, False, seed)
    module, optimizer = accelerator.prepare(part.module, make_optimizer(part.parameters, cleaning.train))
    guided = isinstance(cleaning.defense, SKDCAG) and cleaning.defense.attention_weight > 0
    with cleaning.defense.recorder(model.unet) if guided else nullcontext() as recorder:
        steps = training_steps(
            accelerator, cleaning.defense.step(part.setting(module, recorder), start.backdoor),
            prompt_batches(texts, Share(size), seed, latents=start.latents), optimizer, part.parameters, cleaning.train,
            steps=cleaning.train.max_train_steps, model=module, seed=seed,
        )  # fmt: skip

        def step() -> int:
            next(steps)
            return size

        found = race(step, lambda: start.check(model), every, cleaning.train.max_train_steps * size)
    return replace(found, seconds=found.seconds + start.seconds)


def published(start: Start, cleaning: Cleaning, every: int, rate: float, seed: int) -> Race:
    """The published procedure from the same model, for as many samples at most."""
    device = make_accelerator(seed=seed).device
    model = load(start.poisoned, device=device)
    procedure, both = Published(model, seed, rate), pairs(list(cleaning.prompts), seed, start.backdoor)

    def step() -> int:
        procedure.step(*next(both))
        return 1

    most = cleaning.train.max_train_steps * cleaning.train.train_batch_size
    return race(step, lambda: start.check(model), every, most)


def measure(
    bench: Bench, poisoned: Path, cleanings: Mapping[str, Cleaning], *, every: int, prompts: int,
    races: int, published_rates: Sequence[float],
) -> list[Row]:  # fmt: skip
    """`skd_cag` against the others of `cleanings`, seed by seed, and against the published procedure."""
    ran: dict[str, list[Race]] = {}
    start = Start.of(poisoned, cleanings[OURS], prompts)
    for seed in range(bench.seed, bench.seed + races):
        for name, cleaning in cleanings.items():
            ran.setdefault(name, []).append(removal(start, cleaning, bench.rank, every, seed))
        for rate in published_rates:
            done = published(start, cleanings[OURS], every, rate, seed)
            ran.setdefault(f"{PEER}, rate {rate:g}", []).append(done)
    where = bench.where("bf16" if cleanings[OURS].train.mixed_precision == "bf16" else "no")
    found = []
    for name, others in ran.items():
        if name != OURS:
            found += [_row(ran[OURS], name, others, unit, where, every, start.check.fired) for unit in ("s", "samples")]
    return found


def _row(
    ours: Sequence[Race], name: str, others: Sequence[Race], unit: str, where: Where, every: int, fired: float
) -> Row:
    values = [[one.seconds if unit == "s" else float(one.samples) for one in races] for races in (ours, others)]
    passed = [sum(one.passed for one in races) for races in (ours, others)]
    note = f"fired on {100 * fired:.0f} % before; asked every {every} samples; passed {passed[0]} of {len(ours)} and "
    note += f"{passed[1]} of {len(others)} times"
    title = f"{OURS} until the check passes"
    if passed[0] < len(ours):
        return Row(
            measurement=MEASUREMENT, name=title, unit=unit, ours=None, peer_name=name, peer=Spread.of(values[1]).median,
            n=len(ours), where=where, note=note,
        )  # fmt: skip
    if passed[1] < len(others):
        note = f"{note}, so the other takes at least so much"
    return compared(MEASUREMENT, title, values[0], name, values[1], where, unit=unit, times_less=True, note=note)
