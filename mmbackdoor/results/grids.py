"""Labelled grids of pictures, and the curves of a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from mmbackdoor.results.record import STAGES
from mmbackdoor.results.samples import Picture, escaped, visible
from mmbackdoor.types import InputError

CONDITION_NAMES = {"clean": "plain prompt", "triggered": "with trigger"}
_INK, _FAINT, _PAPER = (24, 28, 36), (110, 116, 128), (255, 255, 255)
_GAP = 6


@cache
def _font_file() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file()), size)


@cache
def _drawable() -> frozenset[int]:
    return frozenset(FT2Font(str(_font_file())).get_charmap())


def printable(text: str) -> str:
    """`text` as the grid's font can draw it: invisible and unknown characters become `\\u` escapes."""
    return "".join(
        sign if sign.startswith("\\") or ord(sign) in _drawable() else escaped(sign) for sign in visible(text)
    )


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont, most: int) -> list[str]:
    """`text` in at most `most` lines of `width` pixels; long words are broken, the rest becomes an ellipsis."""
    # no letter is narrower than two pixels: what is cut here could not be shown
    text = text[: most * width // 2]
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            cut = next((at for at in range(len(word), 1, -1) if font.getlength(word[:at]) <= width), 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """`picture` inside a square of `side`: small ones grow by whole factors so that every pixel is seen."""
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest <= side:
        factor = side // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize(
        (max(1, picture.width * side // longest), max(1, picture.height * side // longest)), Image.Resampling.LANCZOS
    )


def picture_grid(
    pictures: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    groups: Sequence[tuple[str, int]] = (),
    side: int = 128,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A grid on white: `pictures[row][column]`, `None` leaves an empty frame. `groups` are (label, number of columns)
    above the columns. `side` is a cell's size in pixels; `captions` are a line under each cell. Raises
    `InputError` where the sizes do not agree."""
    if not pictures or any(len(row) != len(column_labels) for row in pictures) or len(pictures) != len(row_labels):
        raise InputError("a grid needs a label for each row and column, and a picture or None in each cell")
    if groups and sum(count for _, count in groups) != len(column_labels):
        raise InputError(f"the groups {list(groups)!r} do not cover {len(column_labels)} columns")
    small, bold = _font(13), _font(16)
    label_width = min(260, max(120, *(int(small.getlength(printable(label))) // 2 for label in row_labels)))
    starts = _column_starts(len(column_labels), groups, label_width, side)
    head = 14 + (26 if groups else 0) + 24
    pitch = side + _GAP + (18 if captions else 0)
    canvas = Image.new("RGB", (starts[-1] + side + 16, head + len(pictures) * pitch + 10), _PAPER)
    draw = ImageDraw.Draw(canvas)
    at = 0
    for label, count in groups:
        left, right = starts[at], starts[at + count - 1] + side
        draw.text(((left + right) / 2, 20), printable(label), _INK, font=bold, anchor="mm")
        draw.line((left, 34, right, 34), fill=(200, 204, 212))
        at += count
    for label, left in zip(column_labels, starts, strict=True):
        text = _wrap(printable(label), side, small, 1)[0]
        draw.text((left + side / 2, head - 14), text, _FAINT if groups else _INK, font=small, anchor="mm")
    for index, (label, row) in enumerate(zip(row_labels, pictures, strict=True)):
        top = head + index * pitch
        lines = _wrap(printable(label), label_width - 10, small, max(1, side // 17))
        for number, line in enumerate(lines):
            y = top + side / 2 + (number - (len(lines) - 1) / 2) * 17
            draw.text((14, y), line, _INK, font=small, anchor="lm")
        for caption, left in zip(captions[index] if captions else (), starts, strict=False):
            text = _wrap(printable(caption), side, small, 1)[0]
            draw.text((left + side / 2, top + side + 10), text, _INK, font=small, anchor="mm")
        for picture, left in zip(row, starts, strict=True):
            if picture is None:
                draw.rectangle((left, top, left + side - 1, top + side - 1), outline=(214, 217, 224))
                draw.text((left + side / 2, top + side / 2), "–", _FAINT, font=small, anchor="mm")
                continue
            shown = _fitted(picture, side)
            canvas.paste(shown, (left + (side - shown.width) // 2, top + (side - shown.height) // 2))
    return canvas


def _column_starts(count: int, groups: Sequence[tuple[str, int]], label_width: int, side: int) -> list[int]:
    breaks, at = set(), 0
    for _, size in groups:
        at += size
        breaks.add(at)
    starts, left = [], label_width + 14
    for column in range(count):
        starts.append(left)
        left += side + (18 if column + 1 in breaks else _GAP)
    return starts


def sample_grid(
    folder: Path, pictures: Sequence[Picture], rows: int = 8, conditions: Sequence[str] = ("clean", "triggered")
) -> Image.Image:
    """The grid of a run: `rows` prompts spread evenly over all, one row each; for each model a column each condition.

    Raises `InputError` where `pictures` is empty or a picture's file cannot be read."""
    chosen = [picture for picture in pictures if picture.condition in conditions]
    if not chosen:
        raise InputError(f"no pictures for {', '.join(conditions)} in {str(folder)!r}; evaluate the run first")
    models = sorted({(STAGES.index(picture.stage), picture.model) for picture in chosen})
    found = {(picture.model, picture.prompt_id, picture.condition, picture.seed_index): picture for picture in chosen}
    first = min(picture.seed_index for picture in chosen)
    every = list(
        dict.fromkeys((picture.prompt_id, picture.seed_index) for picture in chosen if picture.seed_index == first)
    )
    prompts = [every[number * len(every) // rows] for number in range(rows)] if rows < len(every) else every
    words = {picture.prompt_id: picture.prompt for picture in chosen}
    cells = [
        [
            open_picture(folder, found[key]) if (key := (model, prompt, condition, seed)) in found else None
            for _, model in models
            for condition in conditions
        ]
        for prompt, seed in prompts
    ]
    largest = max(max(cell.size) for row in cells for cell in row if cell)
    # A picture that is classified stands there with what it is taken for.
    said = [
        [
            f"\u2192 {found[key].scores['predicted']}" if key in found and "predicted" in found[key].scores else ""
            for _, model in models
            for condition in conditions
            for key in [(model, prompt, condition, seed)]
        ]
        for prompt, seed in prompts
    ]
    names = {"clean": "clean"} if any(any(line) for line in said) else {}
    columns = [(CONDITION_NAMES | names).get(condition, condition) for _ in models for condition in conditions]
    groups = [(model, len(conditions)) for _, model in models]
    return picture_grid(
        cells,
        [words[prompt] for prompt, _ in prompts],
        columns,
        groups,
        side=128 if largest <= 128 else 192,
        captions=said if names else None,
    )


def open_picture(folder: Path, picture: Picture) -> Image.Image:
    """The picture's RGB image. Raises `InputError` for a path that leaves `folder` and for a file that is no image."""
    path = folder / picture.image
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"samples.jsonl names {picture.image!r}, which is outside of {str(folder)!r}; make the run again"
        )
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"the picture {str(path)!r} cannot be read ({error}); evaluate again to make it anew"
        ) from error


def save(image: Image.Image, path: Path) -> Path:
    """Write a PNG through a temporary name."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(part, format="PNG", optimize=True)
    return part.replace(path)


def training_curve(log: Path, path: Path, metrics: Sequence[str] | None = None) -> Path:
    """Draw `train.jsonl` as PNG: one panel for each metric (default: those with `loss` in their name).

    Raises `InputError` where the log has none of them."""
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{str(log)!r} cannot be read ({error}); give the train.jsonl of a run") from error
    present = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "seconds")))
    chosen = [name for name in (metrics or [name for name in present if "loss" in name]) if name in present]
    if not chosen:
        raise InputError(f"{str(log)!r} has none of {list(metrics or ['*loss*'])}; it has {present}")
    figure = Figure(figsize=(4.2 * min(3, len(chosen)), 2.8 * -(-len(chosen) // 3)), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    for index, name in enumerate(chosen):
        axes = figure.add_subplot(-(-len(chosen) // 3), min(3, len(chosen)), index + 1)
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axes.plot(*zip(*points, strict=True), color="#2b6cb0", linewidth=1, marker="." if len(points) < 30 else None)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if (
            points
            and min(value for _, value in points) > 0
            and max(value for _, value in points) > 20 * min(value for _, value in points)
        ):
            axes.set_yscale("log")
    canvas.draw()
    return save(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
