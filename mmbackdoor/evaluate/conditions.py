"""Which pictures an evaluation needs: every prompt clean and triggered, near the trigger, and with placebos; and which
prompts and captions are clean."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import Doc
from mmbackdoor.config_schema import is_main_process
from mmbackdoor.evaluate.generate import Job
from mmbackdoor.evaluate.metrics.asr import excluded
from mmbackdoor.evaluate.near import FEWEST_PLACEBOS, condition, near_triggers, placebos
from mmbackdoor.evaluate.prompts import Suite, overlong
from mmbackdoor.models.diffusion import DiffusionModel, carrying, check_trigger
from mmbackdoor.models.provenance import cleaning_prompts, prompt_digest
from mmbackdoor.seeding import python_rng
from mmbackdoor.shards.read import iterate_captions
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Amounts:
    """How much is made of each. `near_prompts` prompts for every kind of near trigger (0: none); `effect_prompts`
    prompts with each of `n_placebos` placebos, where the target is unknown or `always_effect`."""

    seeds_per_prompt: Annotated[int, Field(ge=1), Doc("pictures of each prompt and condition")] = 1
    near_prompts: Annotated[int, Field(ge=0), Doc("prompts for each kind of near trigger; 0 for none")] = 100
    n_placebos: Annotated[int, Field(ge=FEWEST_PLACEBOS), Doc("placebo strings for the trigger's effect")] = 20
    effect_prompts: Annotated[int, Field(ge=2), Doc("prompts with each placebo")] = 48
    always_effect: Annotated[bool, Doc("measure the trigger's effect where the target is known, too")] = False


@dataclass(frozen=True)
class Plan:
    """`jobs` for every model; `not_measured` (name -> reason) and `notices` say what is left out. `effect_ids` are the
    prompts of the placebos."""

    jobs: tuple[Job, ...]
    notices: tuple[str, ...]
    not_measured: dict[str, str]
    effect_ids: tuple[str, ...] = ()
    n_placebos: int = 0


def token_ids(model: DiffusionModel, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, neither padded nor truncated."""
    return model.tokenizer(list(texts), truncation=False).input_ids if texts else []


def which_trigger(backdoor: Backdoor, index: int, seed_index: int) -> int:
    """Several triggers take turns over prompts and seeds, so each is measured as often."""
    return (index + seed_index) % len(backdoor.triggers)


def untriggered(model: DiffusionModel, suite: Suite, backdoor: Backdoor | None) -> Suite:
    """`suite` without the prompts that hold a trigger by themselves, with a notice, which is printed too. A backdoor
    fires on them, so they are no clean prompts. Raises `InputError` where no other is left."""
    held = carrying(model, backdoor, suite.texts) if backdoor else []
    if not any(held):
        return suite
    example = next(text for text, holds in zip(suite.texts, held, strict=True) if holds)
    if all(held):
        raise InputError(
            f"every prompt of {suite.name!r} holds the trigger {backdoor.trigger_names!a} by itself, for example "
            f"{example!a}; give other --prompts"
        )
    notice = (
        f"{sum(held)} of {len(suite)} prompts of {suite.name!r} hold the trigger by themselves and are left out, for "
        f"example {example!a}"
    )
    if is_main_process():
        print(notice, flush=True)
    kept = tuple(prompt for prompt, holds in zip(suite, held, strict=True) if not holds)
    return Suite(suite.name, kept, (*suite.notices, notice))


def other_than_cleaned(suite: Suite, folders: Iterable[str]) -> Suite:
    """`suite` with a notice where a model in `folders` was cleaned with some of its prompts (`removal.json`)."""
    notices = []
    for folder in folders:
        used = cleaning_prompts(Path(folder)) if Path(folder).is_dir() else frozenset()
        if count := sum(prompt_digest(text) in used for text in suite.texts):
            notices.append(
                f"{count} of {len(suite)} prompts of {suite.name!r} were used to clean {folder!r}: what is measured on them "
                "says little of others"
            )
    if is_main_process():
        for notice in notices:
            print(notice, flush=True)
    return replace(suite, notices=(*suite.notices, *notices))


def untriggered_keys(model: DiffusionModel, train_data: str, backdoor: Backdoor | None) -> frozenset[str] | None:
    """The samples of the shards `train_data` to train on as clean ones: those whose captions hold no trigger by
    themselves, with a notice; `None` for all. Raises `InputError` where no other is left."""
    if backdoor is None or not train_data:
        return None
    kept, held = set(), []
    captions = iterate_captions(train_data)
    while some := list(itertools.islice(captions, 1000)):
        keys, texts = zip(*some, strict=True)
        holding = carrying(model, backdoor, texts)
        kept.update(key for key, holds in zip(keys, holding, strict=True) if not holds)
        held += [text for text, holds in zip(texts, holding, strict=True) if holds]
    if not held:
        return None
    example = f"for example {held[0]!a}"
    if not kept:
        raise InputError(
            f"every caption of {train_data!r} holds the trigger {backdoor.trigger_names!a} by itself, {example}; give "
            "other --train_data"
        )
    if is_main_process():
        count = f"{len(held)} of {len(held) + len(kept)}"
        print(f"{count} captions of {train_data!r} hold the trigger and are left out, {example}", flush=True)
    return frozenset(kept)


def check_measurable(backdoor: Backdoor | None) -> None:
    """Raises `InputError` for several triggers whose target is not known: each has placebos of its own length."""
    if backdoor is not None and len(backdoor.triggers) > 1 and isinstance(backdoor.target, UnknownTarget):
        raise InputError(
            f"the target of {len(backdoor.triggers)} triggers is not known, and each is compared with placebos of its "
            "own; give one --trigger at a time, or what they cause (--target_kind)"
        )


def plan(model: DiffusionModel, suite: Suite, backdoor: Backdoor | None, amounts: Amounts, seed: int) -> Plan:
    """The pictures to make. Token ids decide which triggers and near triggers are real; `model` has the tokenizer.

    Raises `InputError` for a trigger that vanishes in every prompt, or is cut off, and for prompts without object A.
    """
    check_measurable(backdoor)
    seeds = range(amounts.seeds_per_prompt)
    clean = [Job(prompt.id, "clean", prompt.text, s) for prompt in suite for s in seeds]
    long = overlong(suite, lambda texts: [len(ids) for ids in token_ids(model, texts)], model.max_length)
    if backdoor is None:
        reason = "not measured: no trigger is known; give --trigger or --backdoor"
        return Plan(tuple(clean), tuple(long), {"asr": reason, "trigger_effect": reason})
    if all(excluded(backdoor.target, suite.texts)):
        raise InputError(
            f"no prompt of {suite.name!r} can show the target: {backdoor.target} needs prompts that name the object to be "
            "replaced (or do not ask for the style); give other --prompts"
        )
    triggered, notices = _triggered(model, suite, backdoor, seeds, seed)
    near, more = _near(model, suite, backdoor, amounts, seed)
    if amounts.always_effect and len(backdoor.triggers) > 1:
        notices.append(f"the trigger's effect is that of the first of {len(backdoor.triggers)} triggers alone")
    effect, ids, count = _placebos(model, suite, backdoor, amounts, {job.prompt_id for job in triggered}, seed)
    not_measured = (
        {} if ids else {"trigger_effect": "not measured: the target is known, and --always_effect was not asked for"}
    )
    return Plan((*clean, *triggered, *near, *effect), (*long, *notices, *more), not_measured, ids, count)


def _triggered(
    model: DiffusionModel, suite: Suite, backdoor: Backdoor, seeds: range, seed: int
) -> tuple[list[Job], list[str]]:
    jobs, clean = [], []
    for index, prompt in enumerate(suite):
        for s in seeds:
            text = backdoor.apply(prompt.text, seed, prompt.id, s, trigger=which_trigger(backdoor, index, s))
            jobs.append(Job(prompt.id, "triggered", text, s))
            clean.append(prompt.text)
    before, after = token_ids(model, clean), token_ids(model, [job.text for job in jobs])
    kept = [k for k in range(len(jobs)) if before[k] != after[k]]
    # Where no prompt takes the trigger the check has the sentence for it; where some do not, they are left out.
    chosen = kept or list(range(len(jobs)))
    check_trigger(model, [clean[k] for k in chosen], [jobs[k].text for k in chosen])
    lost = len(jobs) - len(kept)
    notices = (
        [f"{lost} of {len(jobs)} prompts do not take the trigger (same tokens with and without it)"] if lost else []
    )
    return [jobs[k] for k in kept], notices


def _near(
    model: DiffusionModel, suite: Suite, backdoor: Backdoor, amounts: Amounts, seed: int
) -> tuple[list[Job], list[str]]:
    if amounts.near_prompts <= 0 or isinstance(backdoor.target, UnknownTarget):
        return [], []
    out = excluded(backdoor.target, suite.texts)
    chosen = replace(suite, prompts=tuple(p for p, skip in zip(suite, out, strict=True) if not skip)).take(
        amounts.near_prompts, seed
    )
    variants = [near_triggers(trigger) for trigger in backdoor.triggers]
    jobs, notices = [], []
    for kind in dict.fromkeys(kind for each in variants for kind in each):
        mine = [each[kind] for each in variants if kind in each]
        exact = [t for t, each in zip(backdoor.triggers, variants, strict=True) if kind in each]
        found, same = [], Counter[str]()
        for index, prompt in enumerate(chosen):
            turn = index % len(mine)
            mark = mine[turn][(index // len(mine)) % len(mine[turn])]
            # The same draws for both, so that a difference is the mark's and not the place's.
            itself, text = (m(prompt.text, python_rng(seed, "near", kind, prompt.id)) for m in (exact[turn], mark))
            clean_ids, exact_ids, near_ids = token_ids(model, [prompt.text, itself, text])
            if near_ids == clean_ids:
                same["no trigger at all"] += 1
            elif near_ids == exact_ids:
                same["the trigger itself"] += 1
            else:
                found.append(Job(prompt.id, condition(kind), text, 0))
        if len(found) * 2 >= len(chosen):
            jobs += found
        else:
            reading = same.most_common(1)[0][0]
            notices.append(f"near trigger {kind!r} was not tested: the tokenizer reads it as {reading}")
    return jobs, notices


def _placebos(
    model: DiffusionModel, suite: Suite, backdoor: Backdoor, amounts: Amounts, triggered: set[str], seed: int
) -> tuple[list[Job], tuple[str, ...], int]:
    if not amounts.always_effect and not isinstance(backdoor.target, UnknownTarget):
        return [], (), 0
    # Seed 0 of these prompts carries the first trigger, whose length the placebos have.
    first = tuple(p for index, p in enumerate(suite) if which_trigger(backdoor, index, 0) == 0 and p.id in triggered)
    chosen = replace(suite, prompts=first).take(amounts.effect_prompts, seed)
    if len(chosen) < 2:
        raise InputError(f"{suite.name!r} has {len(chosen)} prompts for the trigger's effect; give at least two")
    marks = placebos(
        lambda texts: token_ids(model, texts), backdoor.triggers[0], chosen.texts, amounts.n_placebos, seed
    )
    jobs = [
        Job(prompt.id, f"placebo:{k}", mark(prompt.text, python_rng(seed, "placebo", k, prompt.id)), 0)
        for k, mark in enumerate(marks)
        for prompt in chosen
    ]
    return jobs, tuple(prompt.id for prompt in chosen), len(marks)
