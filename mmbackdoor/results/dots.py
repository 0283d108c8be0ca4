"""Small multiples of ASR above accuracy: a panel for each objective, a mark for each thing compared, and its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmbackdoor.results.benchmark import Cell
from mmbackdoor.results.frontier import over_seeds
from mmbackdoor.results.scatter import legend, style

WORDS = "A mark is the mean over seeds, its bar the 95 % interval (Student's t), a small dot a seed."


@dataclass(frozen=True)
class Dot:
    """What is drawn at one `place` of the axis for one `series`: fractions, one a seed."""

    place: str
    series: str
    asr: Sequence[float]
    accuracy: Sequence[float]


def dots(panels: Mapping[str, Sequence[Dot]], axis: str, joined: bool = False, dpi: int = 110) -> Image.Image:
    """An RGB picture of title -> marks, a column each. A mark is a mean over seeds, its bar the 95 % interval, a small
    dot a seed; `joined` draws a line through a series. `axis` says what the places are."""
    every = [dot for some in panels.values() for dot in some]
    places, names = (list(dict.fromkeys(of)) for of in zip(*((dot.place, dot.series) for dot in every), strict=True))
    width = len(panels) * max(2.6, len(places) * (0.35 + 0.07 * len(names))) + 0.6
    figure = Figure(figsize=(max(6.5, width), 6.4), layout="constrained", dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, object] = {}
    for (title, some), column in zip(panels.items(), grid.T, strict=True):
        for axes, label in zip(column, ("ASR, %", "accuracy, %"), strict=True):
            for number, name in enumerate(names):
                # Series stand side by side, so that intervals do not hide each other.
                offset = 0.6 * ((number + 0.5) / len(names) - 0.5)
                mine = [dot for dot in some if dot.series == name]
                above = axes is column[0]
                values = {places.index(dot.place) + offset: dot.asr if above else dot.accuracy for dot in mine}
                _series(axes, values, style(number), name, joined, handles)
            axes.set_ylabel(label if axes in grid[:, 0] else "", fontsize=9)
            axes.grid(axis="y", alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_title(title, fontsize=11)
        column[0].set_ylim(-3, 103)
        column[1].set_xlim(-0.6, len(places) - 0.4)
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, places)) > 4 else {}
        column[1].set_xticks(range(len(places)), places, fontsize=8, **slanted)
        column[1].set_xlabel(axis, fontsize=9)
    legend(figure, handles)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _series(
    axes: Axes, values: Mapping[float, Sequence[float]], look: tuple[str, str], name: str, joined: bool,
    handles: dict[str, object],
) -> None:  # fmt: skip
    colour, marker = look
    means = []
    for x, of in values.items():
        found = over_seeds(of)
        means.append(100 * found.mean)
        axes.scatter([x] * len(of), [100 * value for value in of], s=9, c=colour, alpha=0.5, linewidths=0, zorder=2)
        if found.low is not None and found.high is not None:
            axes.vlines(x, max(0, 100 * found.low), min(100, 100 * found.high), colors=colour, linewidth=1.6, zorder=2)
    line = "-" if joined else "none"
    if means:
        form = {"color": colour, "marker": marker, "markersize": 6, "linestyle": line, "linewidth": 0.9, "zorder": 3}
        handles.setdefault(name, axes.plot(list(values), means, **form)[0])


def picks(cells: Sequence[Cell], axis: str = "cleaner") -> Image.Image:
    """What the blind rule and the oracle picked of each cleaner, a panel for each objective. A seed with which every
    run broke off has no dot."""
    panels: dict[str, list[Dot]] = {}
    for cell in cells:
        for series, who in (("picked blind", "blind"), ("picked by the oracle", "oracle")):
            of = [one for one in cell.picks(who) if one]
            if of:
                dot = Dot(cell.cleaner, series, [one.asr for one in of], [one.accuracy for one in of])
                panels.setdefault(cell.objective, []).append(dot)
    return dots(panels, axis)
