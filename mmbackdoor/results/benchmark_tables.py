"""The tables of a benchmark of objectives and cleaners: per cent, means over seeds with 95 % intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from mmbackdoor.results.benchmark import Cell, Measured, Training, cells, read, span, warnings
from mmbackdoor.results.frontier import ASR_LEVELS, LOSSES, Frontier, OverSeeds, Rule, over_seeds
from mmbackdoor.results.tables import Table

Value = Callable[[Frontier], float | None]


def per_cent(found: OverSeeds, digits: int = 1) -> str:
    """`71.3 [65.0, 77.6]`, with the share of seeds that got there where not all did."""
    if found.mean is None:
        return "none"
    bounds = "" if found.low is None else f" [{100 * found.low:.{digits}f}, {100 * found.high:.{digits}f}]"
    beside = "" if found.reached == found.n else f" ({found.reached} of {found.n} seeds)"
    return f"{100 * found.mean:.{digits}f}{bounds}{beside}"


def mean_per_cent(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}"


def start_table(points: Sequence[Measured]) -> Table:
    """A line for each model before cleaning and for its control: ASR with both accuracies beside it."""
    lines = []
    for objective in dict.fromkeys(one.objective for one in points):
        for stage in ("clean", "poisoned"):
            some = [one for one in points if (one.objective, one.stage) == (objective, stage)]
            if some:
                columns = zip(*((one.asr, one.accuracy, one.accuracy_triggered) for one in some), strict=True)
                values = [per_cent(over_seeds(column)) for column in columns]
                pictures = f"{some[0].n:,} ({some[0].asr_n:,})"
                lines.append((f"{objective}, {stage}", *values, pictures, str(len(some))))
    header = ("model", "ASR, %", "accuracy, %", "accuracy with trigger, %", "pictures (with trigger)", "seeds")
    return Table(header, tuple(lines))


def frontier_table(found: Sequence[Cell]) -> Table:
    """The frontier's numbers: per cent, means over seeds with 95 % intervals."""
    lines = []
    for cell in found:
        values = [per_cent(cell.over(lambda one, k=k: one.accuracy_at[k])) for k in range(len(ASR_LEVELS))]
        values += [per_cent(cell.over(lambda one, k=k: one.lowest_asr[k])) for k in range(len(LOSSES))]
        values += [per_cent(cell.over(lambda one: one.area)), per_cent(cell.over(lambda one: one.succeeded), 0)]
        counts = (sum(one.runs for one in cell.frontiers), sum(one.checkpoints for one in cell.frontiers))
        lines.append((f"{cell.objective}, {cell.cleaner}", *values, *map(str, counts), str(len(cell.seeds))))
    header = (
        "objective, cleaner",
        *(f"accuracy at ASR ≤ {100 * level:g} %" for level in ASR_LEVELS),
        *(f"lowest ASR at accuracy −{100 * loss:g}" for loss in LOSSES),
        "area, %",
        "runs that succeed, %",
        "runs",
        "checkpoints",
        "seeds",
    )
    return Table(header, tuple(lines))


def selection_table(found: Sequence[Cell]) -> Table:
    """What the oracle and the blind rule picked, side by side: ASR and accuracy of each; and in how many seeds the rule
    found what it asks for, rather than the best of what was there."""
    lines = []
    for cell in found:
        picks = []
        for some in (cell.picks("oracle"), cell.picks("blind")):
            picks.append(per_cent(over_seeds([one.asr if one else None for one in some])))
            picks.append(per_cent(over_seeds([one.accuracy if one else None for one in some])))
        names = sorted({f"{one.seen.run} step {one.seen.step}" for one in cell.picks("blind") if one})
        admitted = f"{sum(one.admitted for one in cell.frontiers)} of {len(cell.seeds)} seeds"
        lines.append((f"{cell.objective}, {cell.cleaner}", *picks, admitted, "; ".join(names) or "none"))
    header = ("objective, cleaner", "oracle: ASR, %", "oracle: accuracy, %", "blind: ASR, %", "blind: accuracy, %",
              "within the rule's budget", "blind picked")  # fmt: skip
    return Table(header, tuple(lines))


def _blind_accuracy(one: Frontier) -> float | None:
    return None if one.blind is None else one.blind.accuracy


def _blind_asr(one: Frontier) -> float | None:
    return None if one.blind is None else one.blind.asr


def _oracle_accuracy(one: Frontier) -> float | None:
    return None if one.oracle is None else one.oracle.accuracy


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def lost_table(found: Sequence[Cell]) -> Table:
    """What a cleaning costs: points of accuracy below the poisoned model of the same seed (negative: above it)."""
    levels: list[Value] = [lambda one, k=k: one.accuracy_at[k] for k in range(len(ASR_LEVELS))]
    columns = [*levels, _oracle_accuracy, _blind_accuracy]
    lines = [
        (
            f"{cell.objective}, {cell.cleaner}",
            *(per_cent(cell.over(lambda one, of=of: _difference(one.start.accuracy, of(one)))) for of in columns),
            str(len(cell.seeds)),
        )
        for cell in found
    ]
    header = (
        "objective, cleaner",
        *(f"at ASR ≤ {100 * level:g} %" for level in ASR_LEVELS),
        "oracle's pick",
        "blind pick",
        "seeds",
    )
    return Table(header, tuple(lines))


def against_table(found: Sequence[Cell]) -> Table:
    """Cleaners of the same objective against each other: the first's value less the second's, paired by seed."""
    columns: list[Value] = [lambda one: one.accuracy_at[0], _blind_accuracy, _blind_asr]
    lines = []
    for first, second in itertools.combinations(found, 2):
        if first.objective != second.objective:
            continue
        theirs = dict(zip(second.seeds, second.frontiers, strict=True))
        pairs = [(one, theirs[seed]) for seed, one in zip(first.seeds, first.frontiers, strict=True) if seed in theirs]
        values = [per_cent(over_seeds([_difference(of(one), of(other)) for one, other in pairs])) for of in columns]
        lines.append((f"{first.objective}: {first.cleaner} − {second.cleaner}", *values, str(len(pairs))))
    header = (
        "objective: cleaners", f"accuracy at ASR ≤ {100 * ASR_LEVELS[0]:g} %", "blind pick: accuracy",
        "blind pick: ASR", "seeds",
    )  # fmt: skip
    return Table(header, tuple(lines))


def training_table(trainings: Sequence[Training]) -> Table:
    """How the models of each line were trained, by what was in force; `a .. b` where that was not always the same."""
    lines = []
    for key in dict.fromkeys((one.objective, one.cleaner or one.stage) for one in trainings):
        some = [one for one in trainings if (one.objective, one.cleaner or one.stage) == key]
        repeats = [one.false_negatives for one in some if one.false_negatives is not None]
        columns = (
            [one.pairs for one in some], [one.batch_size for one in some], [one.steps for one in some],
            [round(one.epochs, 1) if one.pairs else None for one in some], [one.peak_rate for one in some],
            [one.steps_to_peak for one in some], [one.weight_decay for one in some],
        )  # fmt: skip
        share = f"{100 * sum(repeats) / len(repeats):.2f}" if repeats else "–"
        lines.append((", ".join(key), *map(span, columns), share, str(len(some))))
    header = ("model", "pairs", "batch", "steps", "epochs", "highest rate", "steps to it", "weight decay",
              "false negatives, %", "runs")  # fmt: skip
    return Table(header, tuple(lines))


def tables(points: Sequence[Measured], trainings: Sequence[Training], found: Sequence[Cell]) -> dict[str, Table]:
    """Title -> table of all that was measured."""
    some = {
        "Before cleaning": start_table(points),
        "The frontier": frontier_table(found),
        "Selection": selection_table(found),
        "Accuracy lost": lost_table(found),
        "Cleaners against each other": against_table(found),
        "How they were trained": training_table(trainings),
    }
    return {title: table for title, table in some.items() if table.rows}


def text(folder: Path, rule: Rule) -> str:
    """The tables and the warnings of the benchmark in `folder`, for a terminal."""
    points, trainings = read(folder)
    parts = [
        f"{title}\n\n{table.text()}"
        for title, table in tables(points, trainings, cells(points, trainings, rule)).items()
    ]
    return "\n\n".join(["", *parts, "\n".join(warnings(points, trainings))])
