"""What every evaluation's records share: the facts of a model, the model it is compared with, notes for the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.evaluate.checks import warnings
from mmbackdoor.evaluate.metrics.intervals import Interval
from mmbackdoor.results.record import Record, Stage


@dataclass(frozen=True)
class Facts:
    """What every record of a model says of it."""

    name: str
    sha256: str | None
    stage: Stage
    attack: str | None = None
    defense: str | None = None


class Measured(Protocol):
    """What the models were asked: prompts, or pictures with class names."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Maker:
    """Makes records of one model. `higher`: which metrics are better when higher; a difference is as its metric."""

    facts: Facts
    run_id: str
    backdoor: Backdoor | None
    suite: Measured
    seed: int
    higher: Mapping[str, bool]

    def record(
        self,
        metric: str,
        condition: str,
        interval: Interval,
        unit: str = "fraction",
        notes: dict[str, Any] | None = None,
    ) -> Record:
        return Record(
            run_id=self.run_id,
            stage=self.facts.stage,
            model={"id": self.facts.name, "sha256": self.facts.sha256},
            attack=self.facts.attack,
            defense=self.facts.defense,
            backdoor={"sha256": self.backdoor.sha256} if self.backdoor else None,
            suite={"name": self.suite.name, "sha256": self.suite.sha256},
            condition=condition,
            metric=metric,
            value=interval.value,
            ci_low=interval.low,
            ci_high=interval.high,
            ci_method=interval.method,
            n=interval.n,
            n_prompts=interval.n_prompts,
            unit=unit,
            higher_is_better=self.higher[metric.removesuffix("_difference")],
            seed=self.seed,
            notes=notes or {},
        )

    def point(self, metric: str, condition: str, value: float, n: int, unit: str, notes: dict[str, Any]) -> Record:
        """A record without an interval."""
        made = self.record(metric, condition, Interval(value, value, value, "none", n, n), unit, notes)
        return replace(made, ci_low=None, ci_high=None, ci_method=None)


def before(facts: Mapping[str, Facts]) -> str | None:
    """The model that others are compared with: the poisoned one, else the first whose stage is unknown."""
    for stage in ("poisoned", "unknown"):
        for name, one in facts.items():
            if one.stage == stage:
                return name
    return None


def annotated(records: list[Record], missing: Mapping[str, str], notices: Sequence[str]) -> list[Record]:
    """What holds for the whole evaluation, and its warnings, stand in the first record's notes."""
    if not records:
        return records
    first, doubts = records[0], warnings(records)
    notes: dict[str, Any] = dict(first.notes) if isinstance(first.notes, dict) else {"warnings": list(first.notes)}
    given = notes | {"not_measured": dict(missing), "warnings": [*notes.get("warnings", []), *notices, *doubts]}
    return [replace(first, notes={name: value for name, value in given.items() if value}), *records[1:]]
