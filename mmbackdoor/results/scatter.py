"""Scatter of ASR against accuracy: one point a checkpoint, a marker for each cleaner, a panel for each objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmbackdoor.results.frontier import Point

# Told apart without colour too: Okabe and Ito's colours, and a shape each.
STYLES = (
    ("#0072b2", "o"), ("#e69f00", "^"), ("#009e73", "s"), ("#cc79a7", "D"), ("#56b4e9", "v"), ("#000000", "P"),
    ("#d55e00", "X"), ("#7f7f7f", "<"), ("#8c6d31", ">"),
)  # fmt: skip
STAR = "#d62728"


@dataclass(frozen=True)
class Panel:
    """`poisoned`: the models before cleaning, one a seed. `cleaned`: cleaner -> its checkpoints of every seed and run.
    `picked`: cleaner -> those that the blind rule picked."""

    title: str
    poisoned: Sequence[Point]
    cleaned: Mapping[str, Sequence[Point]]
    picked: Mapping[str, Sequence[Point]]


def scatter(panels: Sequence[Panel], dpi: int = 110) -> Image.Image:
    """An RGB picture. Axes are per cent and the same in every panel; a cleaner keeps its marker through all of them.

    A red star is a poisoned model, a ring is what the blind rule picked.
    """
    cleaners = list(dict.fromkeys(name for panel in panels for name in panel.cleaned))
    styles = {name: style(number) for number, name in enumerate(cleaners)}
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 3.7 * down + 0.5), layout="constrained", dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    handles = {}
    first = None
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(down, across, number + 1, sharex=first, sharey=first)
        first = first or axes
        for name, points in panel.cleaned.items():
            colour, marker = styles[name]
            x, y = _per_cent(points)
            shown = axes.scatter(x, y, s=26, c=colour, marker=marker, alpha=0.65, linewidths=0, label=name, zorder=2)
            handles.setdefault(name, shown)
        for name, points in panel.picked.items():
            x, y = _per_cent(points)
            ring = axes.scatter(x, y, s=110, facecolors="none", edgecolors=styles[name][0], linewidths=1.6, zorder=3)
            handles.setdefault("picked blind", ring)
        x, y = _per_cent(panel.poisoned)
        star = axes.scatter(x, y, s=190, c=STAR, marker="*", edgecolors="white", linewidths=0.8, zorder=4)
        handles.setdefault("poisoned model", star)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel("attack success rate, %", fontsize=9)
        axes.set_ylabel("zero-shot accuracy, %", fontsize=9)
        axes.set_xlim(-5, 105)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure, handles)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def style(number: int) -> tuple[str, str]:
    """Colour and marker of the series with this number; no two alike up to 81."""
    colour, (_, marker) = STYLES[number % len(STYLES)][0], STYLES[(number + number // len(STYLES)) % len(STYLES)]
    return colour, marker


def legend(figure: Figure, handles: Mapping[str, object]) -> None:
    """Below the panels, in as many columns as the names leave room for."""
    room = figure.get_figwidth() / (0.075 * max(map(len, handles)) + 0.45)
    columns = max(1, min(6, int(room), len(handles)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9)


def _per_cent(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * point.asr for point in points], [100 * point.accuracy for point in points]
