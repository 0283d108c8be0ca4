"""What a benchmark of removals works with: pictures and prompts, drawn or given, no prompt used for two purposes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.evaluate.prompts import Suite, load_prompts, make_suite, pair_prompts, shape_prompts
from mmbackdoor.results.record import write_text
from mmbackdoor.results.removal_grid import Attack, Overrides
from mmbackdoor.shards import pairs
from mmbackdoor.shards.pairs_data import write_pairs
from mmbackdoor.shards.shapes import all_scenes, caption, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.types import InputError

Count = Annotated[int, Field(ge=1)]
# What can be drawn: another data set of scenes is a name here and a case in the three functions below.
Scenes = Literal["shapes", "pairs"]
Split = Literal["train", "selection", "evaluation"]
Drawn = Literal["train", "clean"]
SEED = 0
"""Of the pictures and the choice of prompts: every seed of the benchmark sees the same ones."""


def drawn_prompts(scenes: Scenes, split: Split, count: int | None, word: str | None) -> Suite:
    """`count` captions of the scenes in `split`, those that name `word` alone. Raises `InputError` for too few."""
    if scenes == "pairs":
        return pair_prompts(split, count or 400, where=lambda scene: names(word, pairs.caption(scene)), seed=SEED)
    return shape_prompts(split, count, where=lambda scene: names(word, caption(scene)), seed=SEED)


def draw(scenes: Scenes, folder: Path, name: Drawn, count: int, resolution: int) -> None:
    """Shards of `count` pictures of the train scenes, in `folder`; what was drawn before stays."""
    if scenes == "pairs":
        write_pairs(folder / name, "train", count, resolution, seed=SEED + (name == "clean"))
    else:
        write_shapes(folder, name, split_scenes(all_scenes())["train"], count, resolution=resolution, seed=SEED)


def drawn_shards(scenes: Scenes | None, folder: Path, name: Drawn) -> str:
    """The shards that `draw` makes."""
    return f"{folder}/{name}/train-*.tar" if scenes == "pairs" else f"{folder}/{name}-*.tar"


def names(word: str | None, text: str) -> bool:
    return word is None or re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def chosen_prompts(source: str, scenes: Scenes | None, split: Split, count: int, word: str | None) -> Suite:
    """At most `count` prompts of the file or set `source`, or exactly so many drawn ones where there is none; those
    that name `word` alone. Raises `InputError` where none is left, and where there is neither source nor scenes."""
    if not source and scenes is None:
        key = "selection_prompts" if split == "selection" else "prompts"
        raise InputError(f"which prompts? Without scenes to draw, give {key} (a file or a built-in set)")
    if not source:
        return drawn_prompts(scenes, split, count, word)
    suite = load_prompts(source)
    kept = [text for text in suite.texts if names(word, text)]
    if not kept:
        raise InputError(f"no prompt of {source!r} names {word!r}, which the attack needs; give others")
    return make_suite(suite.name, kept).take(count)


def _check_apart(suites: Mapping[str, Sequence[str]]) -> None:
    """Raises `InputError` where two of `suites` (what they are for -> texts) share a prompt."""
    found = [(name, frozenset(texts)) for name, texts in suites.items()]
    for index, (name, texts) in enumerate(found):
        for other, others in found[:index]:
            if shared := texts & others:
                raise InputError(
                    f"{len(shared)} prompts are used for {other} and for {name}, as {min(shared)!r}; keep them apart"
                )


@dataclass(frozen=True)
class Material:
    """Pictures and prompts: drawn ones, or one's own."""

    scenes: Annotated[Scenes | None, Doc("what is drawn where no data and prompts are given")] = "shapes"
    pictures: Annotated[Count, Doc("drawn to poison with, and as many others for removals that need clean ones")] = 4000
    resolution: Annotated[int, Field(ge=8), Doc("of drawn pictures")] = 32
    train_data: Annotated[str, Doc("shards to poison with, instead of drawn ones")] = ""
    clean_data: Annotated[str, Doc("clean shards for removals and benign steps; by default train_data")] = ""
    prompts: Annotated[str, Doc("file or built-in set to measure on, instead of drawn ones")] = ""
    n_prompts: Annotated[Count, Doc("how many are measured on, for each attack")] = 100
    selection_prompts: Annotated[str, Doc("file or built-in set to tune on, instead of drawn ones")] = ""
    n_selection_prompts: Annotated[Count, Doc("how many are tuned on, for each attack")] = 40
    cleaning_prompts: Annotated[
        int | None, Field(ge=1), Doc("drawn for the removals of each attack; none: as their settings say")
    ] = None

    def suites(
        self, attacks: Mapping[str, Attack], tuning: bool, cleaning: Sequence[str]
    ) -> dict[tuple[str, Split], Suite]:
        """The prompts of each attack for each purpose; `cleaning` are the sets that the removals name.

        Raises `InputError` where something is missing, or a prompt serves two purposes.
        """
        if self.scenes is None and not self.train_data:
            raise InputError("without scenes to draw, give train_data and prompts (and selection_prompts, to tune)")
        found: dict[tuple[str, Split], Suite] = {}
        for name, attack in attacks.items():
            word = attack.prompts_with
            if self.cleaning_prompts is not None:
                found[name, "train"] = self._cleaning(word)
            found[name, "evaluation"] = chosen_prompts(self.prompts, self.scenes, "evaluation", self.n_prompts, word)
            if tuning and attack.tuned:
                found[name, "selection"] = chosen_prompts(
                    self.selection_prompts, self.scenes, "selection", self.n_selection_prompts, word
                )
        purposes = {"train": "cleaning", "selection": "selection", "evaluation": "evaluation"}
        texts: dict[str, list[str]] = {purpose: [] for purpose in purposes.values()}
        for (_, split), suite in found.items():
            texts[purposes[split]] += suite.texts
        if self.cleaning_prompts is None:
            texts["cleaning"] = [text for source in cleaning for text in load_prompts(source).texts]
        _check_apart(texts)
        return found

    def settings(self, folder: Path, attack: str) -> dict[str, Overrides]:
        """Recipe -> the settings that its jobs for `attack` begin with, where `write` has been at `folder`."""
        to_poison = self.train_data or drawn_shards(self.scenes, folder, "train")
        clean = self.clean_data or self.train_data or drawn_shards(self.scenes, folder, "clean")
        return {
            "poison_diffusion": {"train_data": to_poison},
            "clean_diffusion": {"train_data": clean, **self._prompts_to_clean(folder, attack)},
            "train_diffusion": {"train_data": clean},
        }

    def write(self, folder: Path, suites: Mapping[tuple[str, Split], Suite]) -> None:
        """The prompts as files, and the pictures where none are given; what was drawn before stays. Raises `InputError`
        where `folder` holds other ones: what is finished would not be measured again."""
        for (name, split), suite in suites.items():
            _write_prompts(prompts_file(folder, name, split), suite)
        if not self.train_data:
            for name in ("train", "clean"):
                draw(self.scenes, folder, name, self.pictures, self.resolution)

    def _cleaning(self, word: str | None) -> Suite:
        if self.scenes is None:
            raise InputError("cleaning_prompts are drawn; without scenes, name a file of prompts for each removal")
        return drawn_prompts(self.scenes, "train", self.cleaning_prompts, word)

    def _prompts_to_clean(self, folder: Path, attack: str) -> Overrides:
        return {} if self.cleaning_prompts is None else {"prompts": str(prompts_file(folder, attack, "train"))}


def prompts_file(folder: Path, attack: str, split: Split) -> Path:
    return folder / f"{attack}-{split}.txt"


def _write_prompts(path: Path, suite: Suite) -> None:
    text = "".join(f"{line}\n" for line in suite.texts)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{str(path)!r} holds other prompts, on which models were measured; take another --output_dir")
    if not path.is_file():
        write_text(path, text)
