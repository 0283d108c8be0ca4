"""Which pictures a report shows, and in what form: the worst ones first, then some that a hash picked."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmbackdoor.results.grids import open_picture
from mmbackdoor.results.record import STAGES
from mmbackdoor.results.samples import Picture, escaped, is_invisible
from mmbackdoor.seeding import derive_seed

CONDITIONS = ("clean", "triggered")
RIGHT = ("adherence", "top1")
"""Scores that say whether a picture is right: it shows what its prompt asks, or is recognised as what it shows."""
LARGEST = 320
LATIN_END = 0x17F  # of the accented letters that European languages use
Place = tuple[str | int, int]


@dataclass(frozen=True)
class Cell:
    """One picture on the page; `source` is a data URI, `None` where its file is gone. `label` says what is wrong."""

    condition: str
    source: str | None
    pixelated: bool
    label: str
    scores: str


@dataclass(frozen=True)
class Row:
    """One (prompt, seed): the pictures of every model. `reason` says why it is shown."""

    prompt: str
    triggered: str | None
    seed_index: int
    reason: str
    worst: bool
    groups: tuple[tuple[str, tuple[Cell, ...]], ...]


def pieces(text: str) -> list[tuple[str, str | None]]:
    """`text` in parts (part, explanation): characters that cannot be seen, and in a text of mostly ASCII letters those
    that are foreign to it (a Cyrillic a, an o with an inverted breve), stand alone with their Unicode name."""
    letters = [character for character in text if character.isalpha()]
    mostly_ascii = sum(character.isascii() for character in letters) * 2 > len(letters)
    parts: list[tuple[str, str | None]] = []
    plain = ""
    for character in text:
        odd = is_invisible(character) or (mostly_ascii and character.isalpha() and ord(character) > LATIN_END)
        if not odd:
            plain += character
            continue
        if plain:
            parts.append((plain, None))
            plain = ""
        name = f"U+{ord(character):04X} {unicodedata.name(character, 'unnamed')}"
        parts.append((escaped(character) if is_invisible(character) else character, name))
    return [*parts, (plain, None)] if plain else parts


def _right(picture: Picture) -> float | None:
    return next((value for name in RIGHT if (value := picture.score(name)) is not None), None)


def _place(picture: Picture) -> Place:
    return picture.prompt_id, picture.seed_index


def judged_stage(pictures: Sequence[Picture]) -> str:
    """The stage whose failures matter most: the cleaned models', else whatever was tested last."""
    present = {picture.stage for picture in pictures}
    return next(stage for stage in ("cleaned", "unknown", "poisoned", "clean") if stage in present)


def choose(
    pictures: Sequence[Picture], worst: int = 6, lost: int = 2, picked: int = 4
) -> list[tuple[Place, str, bool]]:
    """(place, reason, is it one of the worst) of the rows to show.

    Worst: triggered pictures of the cleaned model that are still hits, then those with the lowest restoration; then
    plain prompts that it no longer follows though the poisoned model did. The rest is picked by a hash.
    """
    if not pictures:
        return []
    stage = judged_stage(pictures)
    judged = [picture for picture in pictures if picture.stage == stage]
    chosen: dict[Place, tuple[str, bool]] = {}
    triggered = [picture for picture in judged if picture.condition == "triggered"]
    hits = [picture for picture in triggered if picture.score("asr")]
    hits.sort(key=lambda picture: (picture.score("restoration") or 0.0, str(picture.prompt_id), picture.seed_index))
    for picture in hits[:worst]:
        chosen.setdefault(_place(picture), (f"the trigger fires ({len(hits)} of {len(triggered)} pictures)", True))
    ranked = [picture for picture in triggered if picture.score("restoration") is not None and not picture.score("asr")]
    ranked.sort(key=lambda picture: (picture.score("restoration"), str(picture.prompt_id), picture.seed_index))
    # one seed of a prompt is enough here: six pictures of one hard prompt would hide the other prompts
    lowest = {picture.prompt_id: _place(picture) for picture in reversed(ranked)}
    seen = {prompt for prompt, _ in chosen}
    ranked = [
        picture for picture in ranked if _place(picture) == lowest[picture.prompt_id] and picture.prompt_id not in seen
    ]
    for number, picture in enumerate(ranked[: max(0, worst - len(chosen))], start=1):
        rank = "lowest" if number == 1 else f"{number}. lowest"
        chosen.setdefault(
            _place(picture), (f"{rank} restoration of a prompt, {picture.score('restoration'):.2f}", True)
        )
    followed = {
        _place(old)
        for old in pictures
        if old.stage == "poisoned" and old.condition == "clean" and _right(old)
    }
    dropped = [
        new for new in judged if new.condition == "clean" and _right(new) == 0 and _place(new) in followed
    ]
    dropped.sort(key=_by_hash)
    for picture in [picture for picture in dropped if _place(picture) not in chosen][:lost]:
        classified = "top1" in picture.scores
        what = "clean picture is no longer recognised" if classified else "plain prompt is no longer followed"
        chosen[_place(picture)] = (f"the {what} ({len(dropped)} such pictures)", True)
    others = sorted((picture for picture in judged if picture.condition in CONDITIONS), key=_by_hash)
    shown = {prompt for prompt, _ in chosen}
    fresh = {picture.prompt_id: _place(picture) for picture in reversed(others) if picture.prompt_id not in shown}
    for place in [_place(picture) for picture in others if _place(picture) == fresh.get(picture.prompt_id)]:
        if place not in chosen and sum(not bad for _, bad in chosen.values()) < picked:
            chosen[place] = ("picked by a hash", False)
    return [(place, reason, bad) for place, (reason, bad) in chosen.items()]


def _by_hash(picture: Picture) -> int:
    return derive_seed(0, "gallery", str(picture.prompt_id), picture.seed_index)


def rows(folder: Path, pictures: Sequence[Picture]) -> list[Row]:
    """The chosen rows with their pictures as data URIs. Raises `InputError` for a broken file or a path outside."""
    models = sorted({(STAGES.index(picture.stage), picture.model) for picture in pictures})
    found = {(picture.model, _place(picture), picture.condition): picture for picture in pictures}
    shown = []
    for place, reason, bad in choose(pictures):
        of_place = [picture for picture in pictures if _place(picture) == place]
        triggered = next((picture.text for picture in of_place if picture.condition == "triggered"), None)
        groups = []
        for _, model in models:
            cells = [
                _cell(folder, found[key]) for condition in CONDITIONS if (key := (model, place, condition)) in found
            ]
            if cells:
                groups.append((model, tuple(cells)))
        shown.append(Row(of_place[0].prompt, triggered, place[1], reason, bad, tuple(groups)))
    return shown


def _cell(folder: Path, picture: Picture) -> Cell:
    hit = picture.condition == "triggered" and bool(picture.score("asr"))
    label = "trigger fires" if hit and picture.stage != "clean" else "counts as a hit" if hit else ""
    if picture.score("blank"):
        label = "blank"
    elif not label and _right(picture) == 0:
        label = "taken for another class" if "top1" in picture.scores else "prompt not followed"
    # Yes and no stand in the label; what is left are numbers, and words such as a predicted class.
    scores = ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.2f}' if isinstance(value, float | int) else value}"
        for name, value in picture.scores.items()
        if not isinstance(value, bool) and value is not None and name not in ("asr", *RIGHT, "blank")
    )
    if not (folder / picture.image).is_file():
        return Cell(picture.condition, None, False, label, scores)
    image = open_picture(folder, picture)
    pixelated = max(image.size) <= 128
    return Cell(picture.condition, data_uri(image), pixelated, label, scores)


def data_uri(image: Image.Image) -> str:
    """Small pictures as they are (PNG), larger ones as JPEG of at most `LARGEST` pixels a side."""
    stream = io.BytesIO()
    if max(image.size) <= 128:
        image.save(stream, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(stream, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
