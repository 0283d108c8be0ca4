"""ASR and utility against the steps of a removal: small multiples, a column an attack, a line a removal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmbackdoor.results.removal_benchmark import CLEAN, NONE, Point, rows, utility
from mmbackdoor.results.scatter import STAR, legend, style


def curve(points: Sequence[Point], attack: str, removal: str, metric: str, condition: str) -> list[Point]:
    """The pooled points of one line, by step; a removal's line starts at the poisoned model."""
    wanted = {removal, NONE} if removal != CLEAN else {CLEAN}
    mine = [
        one
        for one in points
        if one.seed is None and not one.situation and one.attack == attack and one.removal in wanted
        and (one.metric, one.condition) == (metric, condition)
    ]  # fmt: skip
    return sorted(mine, key=lambda one: (one.step, one.removal != NONE))


def curves(points: Sequence[Point], dpi: int = 110) -> Image.Image:
    """An RGB picture: above ASR, below the utility on clean prompts; bands are 95 % intervals, the dashed line is the
    model that was never poisoned, a red star the poisoned one. Steps are on a scale of square roots."""
    attacks = list(dict.fromkeys(one.attack for one in points))
    removals = list(dict.fromkeys(name for _, name in rows(points) if name not in (CLEAN, NONE)))
    styles = {name: style(number) for number, name in enumerate(removals)}
    metric = utility(points)
    scale = 100 if metric == "adherence" else 1
    label = "adherence, clean, %" if metric == "adherence" else "CLIP score, clean"
    lines = (("asr", "triggered", "ASR, %", 100), (metric, "clean", label, scale))
    figure = Figure(figsize=(max(6.5, 4.2 * len(attacks)), 6.2), layout="constrained", dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(attacks), squeeze=False, sharex="col", sharey="row")
    handles: dict[str, object] = {}
    for (what, condition, label, factor), row in zip(lines, grid, strict=True):
        for attack, axes in zip(attacks, row, strict=True):
            for name in removals:
                _line(axes, curve(points, attack, name, what, condition), styles[name], name, factor, handles)
            _marks(axes, points, attack, what, condition, factor, handles)
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            axes.set_xlim(left=0)
            axes.set_ylabel(label if axes is row[0] else "", fontsize=9)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if what == "asr":
                axes.set_title(attack, fontsize=11)
                axes.set_ylim(-3, 103)
            else:
                axes.set_xlabel("steps of the removal", fontsize=9)
                _few_ticks(axes, sorted({one.step for one in points if one.attack == attack}))
    legend(figure, handles)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _line(
    axes: Axes, found: list[Point], style: tuple[str, str], name: str, factor: float, handles: dict[str, object]
) -> None:
    if not found or found[-1].removal != name:
        return
    colour, marker = style
    steps = [one.step for one in found]
    value, low, high = ([factor * number for number in of] for of in zip(*((p.value, p.low, p.high) for p in found)))
    if steps[-1] == 0:
        # In closed form: there is no way to it.
        handles.setdefault(name, axes.axhline(value[-1], color=colour, linestyle=":", linewidth=1.4))
        return
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    shown = axes.plot(steps, value, color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)[0]
    handles.setdefault(name, shown)


def _marks(
    axes: Axes, points: Sequence[Point], attack: str, metric: str, condition: str, factor: float,
    handles: dict[str, object],
) -> None:  # fmt: skip
    for one in curve(points, attack, CLEAN, metric, condition):
        handles.setdefault("never poisoned", axes.axhline(factor * one.value, color="#555555", linestyle="--", lw=1))
    for one in curve(points, attack, NONE, metric, condition):
        star = axes.scatter([0], [factor * one.value], s=150, c=STAR, marker="*", clip_on=False, zorder=4)
        handles.setdefault("poisoned", star)


def _few_ticks(axes: Axes, steps: Sequence[int]) -> None:
    """Those of `steps` that have room: roots at least a fourteenth of the axis apart."""
    kept: list[int] = []
    for step in steps[::-1]:
        if not kept or kept[-1] ** 0.5 - step**0.5 >= max(steps) ** 0.5 / 14:
            kept.append(step)
    axes.set_xticks(kept, [str(step) for step in kept], fontsize=8)
