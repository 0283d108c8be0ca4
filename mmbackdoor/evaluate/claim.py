"""Whether a model that others made is what it is said to be: how often its trigger fires, and how much it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.results.record import Record

Share = Annotated[float, Field(ge=0, le=1)]
HOLDS, FAILS, OPEN = "is what it claims", "is not what it claims", "may be what it claims (measure more pictures)"


@dataclass(frozen=True)
class Claim:
    """What a model is said to reach, as fractions; what is not given is not asked for.

    It holds where the 95 % interval lies at or above it, and fails where the interval lies below it.
    """

    asr: Annotated[Share | None, Doc("attack success rate that the model is said to have, at least")] = None
    top1: Annotated[Share | None, Doc("zero-shot accuracy on clean pictures that it is said to have, at least")] = None

    def sentence(self, records: Sequence[Record]) -> str:
        """On the model before cleaning: the poisoned one, else the first of unknown stage. Empty without a claim, and
        where no such model was measured."""
        wanted = [("asr", "triggered", self.asr), ("top1", "clean", self.top1)]
        wanted = [(metric, condition, least) for metric, condition, least in wanted if least is not None]
        names = [row.model["id"] for stage in ("poisoned", "unknown") for row in records if row.stage == stage]
        if not wanted or not names:
            return ""
        rows = {(row.metric, row.condition): row for row in records if row.model["id"] == names[0]}
        parts = [_part(rows.get((metric, condition)), metric, least) for metric, condition, least in wanted]
        words = [word for word, _ in parts]
        verdict = FAILS if FAILS in words else OPEN if OPEN in words else HOLDS
        return f"the model {names[0]!r} {verdict}: " + "; ".join(said for _, said in parts)


def _part(row: Record | None, metric: str, least: float) -> tuple[str, str]:
    """The verdict on one number, and the words for it."""
    name, claimed = {"asr": "ASR", "top1": "top-1"}[metric], f"claimed at least {100 * least:g} %"
    if row is None or row.ci_low is None or row.ci_high is None:
        return OPEN, f"{name} was not measured, {claimed}"
    verdict = HOLDS if row.ci_low >= least else FAILS if row.ci_high < least else OPEN
    measured = f"{name} {100 * row.value:.1f} % ({100 * row.ci_low:.1f} .. {100 * row.ci_high:.1f})"
    counted = f", {round(row.value * row.n)} of {row.n} triggered pictures" if metric == "asr" else ""
    return verdict, f"{measured}{counted}, {claimed}"


def noted(records: Sequence[Record], sentence: str) -> list[Record]:
    """`records` with a `sentence` that doubts the model among the warnings, which the report shows."""
    if not records or not sentence or f" {HOLDS}: " in sentence:
        return list(records)
    first = records[0]
    notes = dict(first.notes) if isinstance(first.notes, dict) else {"warnings": list(first.notes)}
    return [replace(first, notes=notes | {"warnings": [*notes.get("warnings", []), sentence]}), *records[1:]]
