"""Whether a backdoor comes back to a cleaned CLIP: its lines, its tables, its page.

`durability.jsonl` has a line for each model that the blind rule of a benchmark picked, for the one that never was
poisoned, and for what fine-tuning on clean pairs with some poisoned ones among them made of each. Everything that is
shown is derived from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mmbackdoor.results import benchmark_report, grids
from mmbackdoor.results.benchmark import Measured
from mmbackdoor.results.benchmark_tables import mean_per_cent, per_cent
from mmbackdoor.results.dots import WORDS, Dot, dots
from mmbackdoor.results.frontier import over_seeds
from mmbackdoor.results.record import read_lines, write_text
from mmbackdoor.results.tables import Table, markdown_page
from mmbackdoor.types import InputError

LINES, PICTURE = "durability.jsonl", "durability.png"
NEVER = "never poisoned"
REMOVED = 0.1
"""Above this ASR a pick was not cleaned, so that nothing could come back to it."""


@dataclass(frozen=True, kw_only=True)
class Lasting(Measured):
    """A cleaned model, or one that never was poisoned, as a benchmark left it (`poison_pairs` is none) or after
    fine-tuning for some steps, so many passes over clean pairs with `poison_pairs` poisoned ones among them."""

    poison_pairs: int | None = None
    finetune_steps: int = 0
    finetune_epochs: float = 0.0

    @property
    def model(self) -> str:
        return self.cleaner or NEVER


def write(folder: Path, lines: Iterable[Lasting]) -> None:
    write_text(folder / LINES, "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in lines))


def read(folder: Path) -> list[Lasting]:
    """Raises `InputError` where `folder` holds no such lines, or a damaged one."""
    lines = read_lines(folder / LINES, TypeAdapter(Lasting))
    if not any(one.poison_pairs is None for one in lines):
        raise InputError(f"{str(folder / LINES)!r} has no model as it was picked; run benchmark_durability again")
    return lines


def situations(lines: Sequence[Lasting]) -> dict[int | None, str]:
    """The numbers of poisoned pairs, in words, in the order of a table."""
    counts = sorted({one.poison_pairs for one in lines if one.poison_pairs is not None})
    steps = max(one.finetune_steps for one in lines)
    named = {count: f"{count} poison pair{'s' if count > 1 else ''}" for count in counts if count}
    return {None: "as picked"} | ({0: f"{steps} clean steps"} if 0 in counts else {}) | named


def rows(lines: Sequence[Lasting]) -> list[tuple[str, str]]:
    """(objective, model): the one that never was poisoned is the last of its objective."""
    found = dict.fromkeys((one.objective, one.model) for one in lines)
    objectives = list(dict.fromkeys(objective for objective, _ in found))
    return sorted(found, key=lambda row: (objectives.index(row[0]), row[1] == NEVER))


def of(lines: Sequence[Lasting], row: tuple[str, str], count: int | None) -> dict[int, Lasting]:
    """Seed -> line of one model in one situation."""
    return {one.seed: one for one in lines if (one.objective, one.model, one.poison_pairs) == (*row, count)}


def main_table(lines: Sequence[Lasting]) -> Table:
    """ASR in every situation and accuracy in every situation: per cent, means over seeds with 95 % intervals."""
    named, shown = situations(lines), []
    for row in rows(lines):
        some = [list(of(lines, row, count).values()) for count in named]
        values = [per_cent(over_seeds([one.asr for one in found])) for found in some]
        values += [per_cent(over_seeds([one.accuracy for one in found])) for found in some]
        shown.append((", ".join(row), *values, str(len(some[0]))))
    header = [f"{what}, {name}, %" for what in ("ASR", "accuracy") for name in named.values()]
    return Table(("model", *header, "seeds"), tuple(shown))


def beyond_table(lines: Sequence[Lasting]) -> Table | None:
    """ASR above that of the model that never was poisoned and was fine-tuned alike: points, paired by seed."""
    named = {count: name for count, name in situations(lines).items() if count is not None}
    shown = []
    for row in rows(lines):
        if row[1] != NEVER and named:
            values = []
            for count in named:
                mine, control = of(lines, row, count), of(lines, (row[0], NEVER), count)
                both = [mine[seed].asr - control[seed].asr for seed in mine.keys() & control.keys()]
                values.append(per_cent(over_seeds(both)))
            shown.append((", ".join(row), *values))
    return Table(("points of ASR more than a model never poisoned", *named.values()), tuple(shown)) if shown else None


def tables(lines: Sequence[Lasting]) -> dict[str, Table]:
    made = {"ASR and accuracy": main_table(lines), "Above a model never poisoned": beyond_table(lines)}
    return {title: table for title, table in made.items() if table is not None}


def sentences(lines: Sequence[Lasting]) -> list[str]:
    """What became of each pick: ASR in every situation, and what the same did to the model never poisoned."""
    found, named = [], situations(lines)
    for row in rows(lines):
        if row[1] == NEVER:
            continue
        parts = []
        for count, name in named.items():
            both = (of(lines, (row[0], model), count).values() for model in (row[1], NEVER))
            mine, control = ([one.asr for one in some] for some in both)
            if mine:
                beside = f" (never poisoned: {mean_per_cent(control)} %)" if control and count is not None else ""
                parts.append(f"{mean_per_cent(mine)} % {'' if count is None else 'after '}{name}{beside}")
        found.append(f"{row[1]} on {row[0]}: ASR {', '.join(parts)}")
    return found


def warnings(lines: Sequence[Lasting]) -> list[str]:
    """What keeps these numbers from saying what they seem to say, a sentence each."""
    found, named = [], situations(lines)
    for row in rows(lines):
        picks = of(lines, row, None)
        for count, name in named.items():
            lacking = sorted(picks.keys() - of(lines, row, count).keys())
            if lacking:
                of_seeds = ", ".join(map(str, lacking))
                found.append(f"{row[1]} on {row[0]}: fine-tuning for {name} broke off with seed {of_seeds}.")
        high = [one for one in picks.values() if one.asr > REMOVED]
        if row[1] != NEVER and high:
            rate = mean_per_cent([one.asr for one in picks.values()])
            found.append(
                f"{row[1]} on {row[0]}: in {len(high)} of {len(picks)} seeds the pick still had its backdoor (mean ASR "
                f"{rate} %), so that what it has afterwards did not come back."
            )
    seeds = {one.seed for one in lines}
    if len(seeds) < 3:
        found.append(f"Seeds: {len(seeds)}. That is too few to say that a difference is more than chance.")
    return found


def build(folder: Path) -> Path:
    """Write `folder/report.html`, `table.md` and `durability.png`; the page's path.

    Raises `InputError` where `folder` holds no such lines.
    """
    lines = read(folder)
    named = situations(lines)
    panels: dict[str, list[Dot]] = {}
    for count, name in named.items():
        for row in rows(lines):
            some = list(of(lines, row, count).values())
            if some:
                dot = Dot(name, row[1], [one.asr for one in some], [one.accuracy for one in some])
                panels.setdefault(row[0], []).append(dot)
    picture = grids.save(dots(panels, "fine-tuning", joined=True), folder / PICTURE)
    said = warnings(lines)
    write_text(folder / benchmark_report.TABLE, markdown_page(tables(lines), said))
    tuned = [one for one in lines if one.finetune_steps]
    passes = f"{max(one.finetune_epochs for one in tuned):.2g} passes over the pairs" if tuned else "none"
    return benchmark_report.page(
        folder,
        "study.html.j2",
        title="Does the backdoor come back?",
        lead=f"{len(lines)} models of {len({one.seed for one in lines})} seeds; fine-tuning: {passes}",
        files=LINES,
        sentences=sentences(lines),
        warnings=said,
        picture=benchmark_report.inline(picture),
        drawn="ASR and accuracy as picked and after fine-tuning, a panel for each objective",
        words=f"{WORDS} Poisoned pairs are the same for every model of a seed, and fewer of them are a part of more. "
        "The model never poisoned was not cleaned: it had not seen these clean pairs before.",
        tables=tables(lines),
    )
