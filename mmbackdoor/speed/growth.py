"""How cost grows with the work: the exponent of a power law, from doublings of one thing at a time.

1 is linear. Prompts: seconds of an epoch of SKD-CAG. Batch and resolution (in pixels): seconds of a step. Shards, all
of one size: seconds to read them once. Processes, each with its own batch: seconds of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmbackdoor.defenses import SKDCAG
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.speed.bench import Bench
from mmbackdoor.speed.rows import Goal, Row, Where
from mmbackdoor.speed.skd_steps import removals
from mmbackdoor.speed.timing import Spread, Timed, exponent

MEASUREMENT = "growth"
GOAL = Goal(1.1)
PLOT = "growth.png"
FEWEST_PROMPTS, PER_SHARD = 16, 64
Costs = Mapping[float, Sequence[float]]
"""Size -> the cost in each round."""


def measure(bench: Bench, folder: Path, doublings: int) -> list[Row]:
    """Needs `doublings` >= 1. One process; `processes_row` is for several."""
    precision = bench.precisions[0]
    accelerator, model, prompts = bench.accelerator(precision), bench.model(), bench.prompts()
    defense = {"step": bench.removal(SKDCAG)}
    factors = [2**k for k in range(doublings + 1)]

    def step(batch: int = bench.batch_size, texts: list[str] | None = None, on: DiffusionModel = model) -> Timed:
        return removals(replace(bench, batch_size=batch), on, accelerator, precision, defense, texts)["step"]

    def epoch(count: int) -> Timed:
        one = step(texts=prompts[:count])

        def act() -> None:
            for _ in range(-(-count // bench.batch_size)):
                one.act()

        return Timed(act, one.around)

    def read(count: int) -> Timed:
        paths = [str(path) for path in shards[:count]]
        return Timed(lambda: sum(len(rows) for rows in ShardLoader(paths, seed=0, batch_size=32, epochs=1)))

    scenes = all_scenes()
    shards = write_shapes(folder / "growth", "train", scenes, PER_SHARD * factors[-1], 32, samples_per_shard=PER_SHARD)
    counts = [min(FEWEST_PROMPTS * factor, len(prompts)) for factor in factors]
    smallest = model.resolution // 2 if bench.architecture == "tiny" else model.resolution // factors[-1]
    sides = [smallest * factor for factor in factors]
    axes: dict[str, dict[float, Timed]] = {
        "prompts": {count: epoch(count) for count in dict.fromkeys(counts)},
        "batch": {factor: step(batch=factor) for factor in factors},
        "pixels": {side * side: step(on=DiffusionModel(model.pipe, resolution=side)) for side in sides},
        "shards": {factor: read(factor) for factor in factors},
    }
    found, seen = [], {}
    for name, sizes in axes.items():
        seconds = bench.time({str(size): timed for size, timed in sizes.items()})
        seen[name] = {size: seconds[str(size)] for size in sizes}
        found.append(_row(name, seen[name], bench.where(precision)))
    plot(seen).save(folder / PLOT)
    return found


def processes_row(costs: Costs, where: Where) -> Row:
    """From the seconds of a step of 1, 2, ... processes, each with its own batch."""
    return _row("processes", costs, where)


def _row(name: str, costs: Costs, where: Where) -> Row:
    sizes = sorted(costs)
    slopes = [exponent(sizes, values) for values in zip(*(costs[size] for size in sizes), strict=True)]
    spread = Spread.of(slopes)
    first, last = (Spread.of(costs[size]).median for size in (sizes[0], sizes[-1]))
    return Row(
        measurement=MEASUREMENT, name=f"cost against {name}", unit="s", ours=last, peer_name=f"{sizes[0]:g} {name}",
        peer=first, ratio_of="exponent", ratio=spread.median, ratio_low=spread.low, ratio_high=spread.high, n=spread.n,
        goal=str(GOAL), reached=GOAL.reached(spread.median), where=where,
        note=f"{name}: {', '.join(f'{size:g}' for size in sizes)}; the ratio is the exponent, 1 is linear",
    )  # fmt: skip


def plot(seen: Mapping[str, Costs], dpi: int = 110) -> Image.Image:
    """An RGB picture: a panel for each thing that grew, medians and ranges, and a dotted line that is linear."""
    figure = Figure(figsize=(3.4 * len(seen), 3.2), layout="constrained", dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    for axes, (name, costs) in zip(figure.subplots(1, len(seen), squeeze=False)[0], seen.items(), strict=True):
        sizes = sorted(costs)
        spreads = [Spread.of(costs[size]) for size in sizes]
        medians = [one.median for one in spreads]
        reach = [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
        axes.errorbar(sizes, medians, reach, marker="o", color="#0072b2", capsize=3)
        axes.plot(sizes, [medians[0] * size / sizes[0] for size in sizes], ":", color="#7f7f7f", label="linear")
        slope = exponent(sizes, medians)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds", title=f"exponent {slope:.2f}")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
