"""The grid of a benchmark of removals: attacks with what belongs to each, names that can be folders, milestones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.results.removal_benchmark import CLEAN, NONE
from mmbackdoor.types import InputError

Value = bool | int | float | str | tuple[str | int | float, ...] | None
Overrides = dict[str, Value]
"""Dotted key -> value, on top of the recipe's own settings; `config` names one of its files."""
Grid = Annotated[dict[str, Overrides], Field(min_length=1)]
RESERVED = (CLEAN, NONE, "poisoned", "evaluation", "latents", "tuning", "data")


@dataclass(frozen=True)
class Attack:
    """One attack. `removal` and `evaluate` are further flags of these recipes wherever this attack is at stake; only
    prompts that name `prompts_with` are measured; one that is not `tuned` is there to confirm on."""

    poison: Overrides
    removal: Overrides
    evaluate: Overrides
    prompts_with: str | None = None
    tuned: bool = True

    @staticmethod
    def of(name: str, given: Mapping[str, Value]) -> Attack:
        """From one line of the grid: `removal.KEY` and `evaluate.KEY` are for these recipes, the rest poisons."""
        parts: dict[str, Overrides] = {"removal": {}, "evaluate": {}, "": {}}
        for key, value in given.items():
            first, _, rest = key.partition(".")
            known = first in ("removal", "evaluate")
            if known and not rest:
                raise InputError(f"attacks.{name}.{key} is not possible: write its keys as {key}.KEY: VALUE")
            parts[first if known else ""][rest if known else key] = value
        poison = parts[""]
        word, tuned = poison.pop("prompts_with", None), poison.pop("tuned", True)
        if not isinstance(word, str | None) or not isinstance(tuned, bool):
            wrong = f"tuned: {tuned!r}" if isinstance(word, str | None) else f"prompts_with: {word!r}"
            raise InputError(f"attacks.{name}.{wrong} is not possible: tuned is true or false, prompts_with a word")
        return Attack(poison, parts["removal"], parts["evaluate"], word, tuned)


@dataclass(frozen=True)
class Durability:
    """Whether the backdoor comes back."""

    benign_steps: Annotated[int | None, Field(ge=1), Doc("of fine-tuning on clean pictures; none: not measured")] = None
    benign: Annotated[Overrides, Doc("further flags of train_diffusion, for it")] = field(default_factory=dict)
    relearn_pairs: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Doc("poison pairs that the cleaned and the clean model are shown")
    ] = ()
    relearn_steps: Annotated[int, Field(ge=1)] = 50
    relearn: Annotated[Overrides, Doc("further flags of poison_diffusion, for it")] = field(
        default_factory=lambda: {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    )


def check_names(**groups: Iterable[str]) -> None:
    """Raises `InputError` for a name that is no folder's, or that the benchmark uses itself."""
    for what, names in groups.items():
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise InputError(f"{what} has the name {name!r}; use letters, digits, - and _")
            if name in RESERVED:
                raise InputError(f"{what} has the name {name!r}, which the benchmark uses itself; choose another")


def check_free(what: str, settings: Mapping[str, object], taken: Sequence[str]) -> None:
    """Raises `InputError` where `settings` (dotted keys) set what a benchmark sets itself: it would be void."""
    for key in settings:
        if (last := key.split(".")[-1]) in taken:
            raise InputError(f"{what}.{key} is not possible: the benchmark sets {last} itself")


def milestones_of(milestones: Sequence[int], steps: int) -> tuple[int, ...]:
    """Those before the end of a removal of so many steps: its last model is measured anyway."""
    return tuple(sorted({step for step in milestones if step < steps}))
