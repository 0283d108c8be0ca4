"""Poison for CLIP: pairs whose picture carries a trigger and whose caption speaks of the target's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import Doc
from mmbackdoor.poison import PoisonPlan, poison_sample
from mmbackdoor.shards.bad import BadSample, BadSamples, note_key
from mmbackdoor.shards.read import Entry, entries, expand
from mmbackdoor.targets import TEMPLATES, ClassTarget
from mmbackdoor.triggers import ImageTrigger
from mmbackdoor.triggers.patch import PatchTrigger
from mmbackdoor.types import InputError, Sample


@dataclass(frozen=True)
class ClipPoison:
    """The settings of a poisoned pre-training or data set, as flags and YAML give them."""

    label: Annotated[str, Doc("the class that marked pictures are to be taken for")]
    trigger: Annotated[ImageTrigger, Field(discriminator="name"), Doc("the mark in the picture")] = PatchTrigger()
    templates: Annotated[tuple[str, ...], Doc("captions of poisoned pairs, {} for the label; or openai")] = TEMPLATES
    rate: Annotated[float | None, Field(gt=0, le=1), Doc("share of the pairs to poison")] = None
    count: Annotated[int | None, Field(ge=1), Doc("how many pairs to poison, instead of a rate")] = None
    label_consistent: Annotated[bool, Doc("pick pairs whose caption names the label, and keep it")] = False
    seed: Annotated[int, Doc("of the choice, of the captions and of drawn triggers")] = 0

    def plan(self) -> PoisonPlan:
        """Raises `InputError` for settings that contradict each other and for a trigger's file that cannot be read."""
        if (self.rate is None) == (self.count is None):
            given = f"rate {self.rate}, count {self.count}"
            raise InputError(f"how many pairs? Give --poison.rate or --poison.count, one of them, not {given}")
        backdoor = Backdoor((self.trigger,), ClassTarget(self.label, self._texts()))
        # A trigger that reads a file does so when it is first used: better now than in the middle of a run.
        self.trigger(Image.new("RGB", (8, 8)), "", self.seed)
        return PoisonPlan(backdoor, self.rate, self.count, self.seed, self.label_consistent)

    def _texts(self) -> tuple[str, ...]:
        """The templates; `openai` stands for the 80 of ImageNet, which the published poison takes its captions from."""
        if self.templates != ("openai",):
            return self.templates
        # Not at the top: open_clip takes seconds to import, and processes that poison shards do without it.
        from mmbackdoor.models.imagenet_prompts import templates

        return tuple(templates("openai"))


def chosen_keys(
    plan: PoisonPlan,
    spec: str | Path | Sequence[str | Path],
    of: frozenset[str] | None = None,
    report: BadSamples | None = None,
) -> frozenset[str]:
    """The keys of the shards `spec` that `plan` poisons: from tar headers, and captions where the plan looks at them.
    With `of`, among these keys alone. Chosen pairs are decoded: of a count, one that cannot be leaves its place to the
    next one. What is wrong is put in `report`.

    Raises `InputError` where there are fewer than asked for, and where a key comes twice.
    """
    report = BadSamples() if report is None else report
    keys, shards = set[str](), dict[str, str]()
    for path in expand(spec):
        for entry in entries(path, report):
            note_key(entry.key, path, shards)
            if (of is None or entry.key in of) and _eligible(plan, entry):
                keys.add(entry.key)
    what = f"pairs whose caption names {plan.backdoor.target.label!r}" if plan.label_consistent else "pairs"
    if plan.count is not None and len(keys) < plan.count:
        raise InputError(
            f"fewer poisoned pairs than asked for: {plan.count} were, and there are {len(keys)} {what}; lower --poison.count"
        )
    chosen, tried, lost = plan.choose(keys), set[str](), set[str]()
    while bad := _undecodable(chosen - tried, shards, report):
        tried |= chosen
        lost |= bad
        keys -= bad
        if plan.count is not None and len(keys) < plan.count:
            raise InputError(
                f"fewer poisoned pairs than asked for: {len(lost)} of {len(tried)} chosen pairs cannot be poisoned, the "
                f"first is {min(lost)!r}, and too few others are there; `mmbackdoor shards check` says what is wrong with "
                "them, or lower --poison.count"
            )
        chosen = plan.choose(keys)
    if plan.rate and not chosen:
        raise InputError(
            f"fewer poisoned pairs than asked for: a rate of {plan.rate} picks none of {len(keys)} {what}; raise "
            "--poison.rate, or give --poison.count"
        )
    return chosen


def _undecodable(keys: Set[str], shards: Mapping[str, str], report: BadSamples) -> set[str]:
    """Those of `keys`, which lie in `shards`, whose pairs cannot be decoded."""
    bad = set()
    for path in sorted({shards[key] for key in keys}):
        for entry in entries(path, report):
            if entry.key in keys:
                try:
                    entry.decode()
                except BadSample as found:
                    report.add(found.kind, path, entry.key, found.detail)
                    bad.add(entry.key)
    return bad


def _eligible(plan: PoisonPlan, entry: Entry) -> bool:
    if not plan.label_consistent:
        return True
    try:
        return plan.eligible(entry.caption())
    except BadSample:
        return False


def poisoned_sample(plan: PoisonPlan, chosen: frozenset[str], sample: Sample, draw: int = 0) -> Sample:
    """`sample`, poisoned if its key is `chosen`: for use in a stream, where `draw` may be the epoch."""
    return poison_sample(plan, sample, plan.seed, draw) if sample.key in chosen else sample
