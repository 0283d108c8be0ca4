"""The lines of a benchmark of removals, out of the folders that its jobs left: what was measured, run and tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmbackdoor.evaluate.metrics.intervals import Interval
from mmbackdoor.evaluate.summary import MEANS, RATES
from mmbackdoor.models.provenance import read_removal
from mmbackdoor.results import samples
from mmbackdoor.results.removal_benchmark import NONE, UTILITIES, Point, RemovalRun, Where
from mmbackdoor.results.removal_pooling import Trial, pooled_difference, pooled_mean, pooled_rate
from mmbackdoor.results.removal_tuning import TunedTrial, moments
from mmbackdoor.results.run import LOG_NAME, read_run
from mmbackdoor.types import InputError, RunFault

Values = dict[tuple[str, str], dict[tuple[str, int], float]]
"""(metric, condition) -> (prompt, number of the picture of it) -> value."""
PAIRED = tuple((metric, condition, "clean") for metric in UTILITIES for condition in ("clean", "triggered"))
PAIRED += (("asr", "triggered", "triggered"),)
"""Metric, condition, and the condition of the poisoned model that it is compared with."""


@dataclass(frozen=True)
class Seen:
    """One model of one seed of the benchmark, with what was measured on each of its pictures."""

    where: Where
    seed: int
    values: Values


def seen(evaluation: Path, models: Mapping[str, Where], seed: int) -> list[Seen]:
    """What `evaluation/samples.jsonl` holds of `models` (name in the evaluation -> which model that is).

    Raises `RunFault` where it lacks one of them.
    """
    values: dict[str, Values] = {name: {} for name in models}
    for picture in samples.read(evaluation):
        of = values.get(picture.model)
        if of is None:
            continue
        place = (str(picture.prompt_id), picture.seed_index)
        scores = {metric: picture.score(metric) for metric in (*RATES, *MEANS)}
        if picture.condition in ("clean", "triggered"):
            scores["blank"] = float(bool(picture.score("blank")))
        for metric, value in scores.items():
            if value is not None:
                of.setdefault((metric, picture.condition), {})[place] = value
    lacking = [name for name, found in values.items() if not found]
    if lacking:
        raise RunFault(f"{str(evaluation)!r} does not measure {lacking[0]!r}; remove it and start again")
    return [Seen(where, seed, values[name]) for name, where in models.items()]


def steps_of(run: Path) -> int:
    """The steps that made `run/model`; 0 for a removal in closed form. Raises `RunFault` without a removal.json."""
    removal = read_removal(run / "model")
    if removal is None:
        raise RunFault(f"{str(run / 'model')!r} has no removal.json; remove {str(run)!r} and start again")
    return int(removal.get("steps", 0))


def removal_run(run: Path, attack: str, removal: str, seed: int) -> RemovalRun:
    """What `run/run.json` and its log say of a removal."""
    content = read_run(run)
    train = content["config"]["train"]
    log = run / LOG_NAME
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    steps = json.loads(lines[-1])["step"] if lines else 0
    batch = train["train_batch_size"] * train["gradient_accumulation_steps"] * content["world_size"]
    return RemovalRun(
        attack=attack, removal=removal, seed=seed, steps=steps, samples=steps * batch, seconds=content["seconds"],
        status="finished" if content["status"] == "finished" else "failed", error=content["error"],
    )  # fmt: skip


def points(found: Sequence[Seen]) -> list[Point]:
    """The numbers of every model, for each seed and pooled over all, paired with the poisoned model where cleaned."""
    groups: dict[Where, dict[str, Values]] = {}
    for one in found:
        groups.setdefault(one.where, {})[str(one.seed)] = one.values
    lines = []
    for where, by_seed in groups.items():
        before: dict[str, Values] = {}
        if where.stage == "cleaned":
            stressed = where.situation if where.situation.startswith("stress:") else ""
            wanted = Where(attack=where.attack, removal=NONE, stage="poisoned", situation=stressed)
            before = groups.get(wanted, {})
        for seed in (*by_seed, None):
            chosen = by_seed if seed is None else {seed: by_seed[seed]}
            count = {"seed": None if seed is None else int(seed), "seeds": len(chosen)}
            for metric, condition, unit, interval in _numbers(chosen, before):
                lines.append(Point(
                    **asdict(where), **count, condition=condition, metric=metric, value=interval.value,
                    low=interval.low, high=interval.high, ci_method=interval.method, n=interval.n,
                    n_prompts=interval.n_prompts, unit=unit,
                ))  # fmt: skip
    return lines


def _trials(by_seed: Mapping[str, Values], key: tuple[str, str]) -> dict[Trial, float]:
    return {(seed, *place): value for seed, of in by_seed.items() for place, value in of.get(key, {}).items()}


def _numbers(by_seed: Mapping[str, Values], before: Mapping[str, Values]) -> list[tuple[str, str, str, Interval]]:
    """(metric, condition, unit, number) of one model over the seeds given."""
    made = []
    for metric, condition in dict.fromkeys(key for of in by_seed.values() for key in of):
        pool = pooled_mean if metric in MEANS else pooled_rate
        found = pool(_trials(by_seed, (metric, condition)))
        made.append((metric, condition, MEANS.get(metric, "fraction"), found))
    for metric, condition, against in PAIRED:
        change = pooled_difference(_trials(by_seed, (metric, condition)), _trials(before, (metric, against)))
        if change is not None:
            made.append((f"{metric}_difference", condition, MEANS.get(metric, "fraction"), change))
    return made


def utility_of(poisoned: Sequence[Seen]) -> str:
    """The utility that all of the `poisoned` models of tuning have, so that none of them drops out of the choice.

    Raises `InputError` where there is none, and where the ASR of one of them could not be measured.
    """
    for one in poisoned:
        if ("asr", "triggered") not in one.values:
            raise InputError(
                f"the ASR of {_name(one)} cannot be measured on its selection prompts, so nothing can be tuned on it; "
                "give evaluate.judge (a style needs one), or leave the attack out with tuned: false"
            )
    shared = [name for name in UTILITIES if all((name, "clean") in one.values for one in poisoned)]
    if not shared:
        names = ", ".join(map(_name, poisoned))
        raise InputError(
            f"neither adherence nor CLIP scores can be measured on the selection prompts of all of {names}, so that "
            "nobody could tell what a removal costs; give evaluate.judge"
        )
    return shared[0]


def unmeasured(cleaned: Sequence[Seen], utility: str) -> str | None:
    """Which of the `cleaned` models of a trial has no ASR or `utility`, as where all pictures are blank; else None."""
    for one in cleaned:
        for metric in ("asr", utility):
            if (metric, "triggered") not in one.values:
                return f"{_name(one)}: no picture with the trigger counts for {metric} after {one.where.step} steps"
    return None


def tuned_trial(
    removal: str,
    trial: int,
    settings: Mapping[str, object],
    poisoned: Sequence[Seen],
    cleaned: Sequence[Seen],
    steps: Sequence[int],
    conditions: Sequence[str],
) -> TunedTrial:
    """The line of one trial: all tuning attacks and seeds in one, each with its poisoned model among `poisoned`. ASR is
    looked at after each of `steps` (`moments`), the rest at the end of each."""
    metric = utility_of(poisoned)
    ways: dict[str, dict[int, Values]] = {}
    for one in cleaned:
        ways.setdefault(_name(one), {})[one.where.step] = one.values
    before, ends = {_name(one): one.values for one in poisoned}, _after(ways, max(steps))
    change = {}
    for condition in ("clean", "triggered"):
        found = pooled_difference(_trials(ends, (metric, condition)), _trials(before, (metric, "clean")))
        if found is not None:
            change[condition] = (found.value, found.low, found.high)
    rates = {str(step): pooled_rate(_trials(_after(ways, step), ("asr", "triggered"))) for step in steps}
    levels = [pooled_mean(_trials(ends, (metric, condition))) for condition in conditions]
    return TunedTrial(
        removal=removal,
        trial=trial,
        settings=dict(settings),
        attacks=tuple(dict.fromkeys(one.where.attack for one in poisoned)),
        seeds=tuple(dict.fromkeys(one.seed for one in poisoned)),
        utility=metric,
        level=sum(one.value for one in levels) / len(levels),
        asr={step: rate.value for step, rate in rates.items()},
        asr_bounds={step: (rate.low, rate.high) for step, rate in rates.items()},
        change=change,
        n=levels[0].n,
    )


def tuned_trials(
    removal: str,
    trials: Sequence[tuple[Mapping[str, object], Sequence[Seen], str | None]],
    poisoned: Sequence[Seen],
    milestones: Sequence[int],
    conditions: Sequence[str],
) -> list[TunedTrial]:
    """The lines of all `trials` of one removal: settings, what was seen, and where it broke off."""
    steps = moments(milestones, max((one.where.step for _, found, _ in trials for one in found), default=0))
    lines = []
    for number, (settings, found, error) in enumerate(trials):
        error = error or unmeasured(found, utility_of(poisoned))
        if error is None:
            lines.append(tuned_trial(removal, number, settings, poisoned, found, steps, conditions))
            continue
        of = {(one.where.attack, one.seed): None for one in poisoned}
        attacks, seeds = (tuple(dict.fromkeys(some)) for some in zip(*of, strict=True))
        lines.append(TunedTrial(
            removal=removal, trial=number, settings=dict(settings), attacks=attacks, seeds=seeds, asr={},
            asr_bounds={}, change={}, error=error,
        ))  # fmt: skip
    return lines


def _after(ways: Mapping[str, Mapping[int, Values]], step: int) -> dict[str, Values]:
    """Every attack's and seed's model after so many steps: beyond its own last one it stays as it is."""
    return {name: of[min(step, max(of))] for name, of in ways.items()}


def _name(one: Seen) -> str:
    return f"{one.where.attack}, seed {one.seed}"
