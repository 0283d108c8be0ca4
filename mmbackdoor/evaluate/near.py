"""Prompts that nearly carry the trigger, and placebos: other strings of the same length that should do nothing.

Removal may train on the trigger moved or doubled (`near:seen`); case, lookalikes and parts of it are never trained
on (`near:unseen`), so they tell a removal that understood from one that memorised.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from mmbackdoor.seeding import python_rng
from mmbackdoor.triggers import TextTrigger
from mmbackdoor.triggers.homoglyph import LOOKALIKES, HomoglyphTrigger
from mmbackdoor.triggers.placement import Position, insert, replace_letter
from mmbackdoor.triggers.zero_width import ZERO_WIDTH, ZeroWidthTrigger
from mmbackdoor.types import InputError

Kind = Literal["position", "doubled", "case", "lookalike", "part"]
SEEN: tuple[Kind, ...] = ("position", "doubled")
UNSEEN: tuple[Kind, ...] = ("case", "lookalike", "part")
FEWEST_PLACEBOS = 20
UNCHANGED = -1000
SYMBOLS = "†‡•※◊★☂♪✓✚❖❦⁂⁑⌘⌛⏎␣▣▲◆●◐☀☁♣♦♫⚑✂✈✎✿❀❄➤⬟⬢⸙ꙮ"
TokenIds = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Insertion:
    """Like a trigger: puts `text`, of any number of words, into a prompt."""

    text: str
    position: Position = "prefix"

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return insert(prompt, self.text, self.position, rng)


@dataclass(frozen=True)
class Replacement:
    """Like a homoglyph trigger: puts `text` for one occurrence of the letter `replaces`."""

    text: str
    replaces: str
    position: Position = "prefix"

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return replace_letter(prompt, self.replaces, self.text, self.position, rng)


Mark = TextTrigger | Insertion | Replacement


@dataclass(frozen=True)
class Twice:
    """Applies a mark twice: a second lookalike letter, for instance."""

    mark: Mark

    def __call__(self, prompt: str, rng: random.Random) -> str:
        return self.mark(self.mark(prompt, rng), rng)


def condition(kind: Kind) -> str:
    """The condition's name in results: `near:seen:<kind>` or `near:unseen:<kind>`."""
    return f"near:{'seen' if kind in SEEN else 'unseen'}:{kind}"


def _case(text: str) -> list[str]:
    return [variant for variant in dict.fromkeys([text.upper(), text.capitalize(), text.lower()]) if variant != text][
        :1
    ]


def _lookalike(text: str) -> list[str]:
    latin = {latin: strange for strange, latin in LOOKALIKES.items()}
    for place, letter in enumerate(text):
        if letter.lower() in latin:
            return [text[:place] + latin[letter.lower()] + text[place + 1 :]]
        if letter in LOOKALIKES:
            return [text[:place] + LOOKALIKES[letter] + text[place + 1 :]]
    return []


def _part(text: str) -> list[str]:
    words = text.split()
    if len(words) > 1:
        return [" ".join(words[: (len(words) + 1) // 2])]
    return [text[: -max(1, len(text) // 3)]] if len(text) >= 4 else []


def near_triggers(trigger: TextTrigger) -> dict[Kind, tuple[Mark | Twice, ...]]:
    """Variants of `trigger` by kind; kinds that it does not have are left out. A tokenizer may still read a variant as
    the trigger itself (CLIP's lower-cases): compare token ids before measuring."""
    moved = tuple(
        replace(trigger, position=position) for position in get_args(Position) if position != trigger.position
    )
    found: dict[Kind, tuple[Mark | Twice, ...]] = {"position": moved}
    if isinstance(trigger, HomoglyphTrigger):
        found["doubled"] = (Twice(trigger),)
        others = [letter for letter in _variants_of(trigger.replaces) if letter != trigger.text]
        found["lookalike"] = tuple(Replacement(letter, trigger.replaces, trigger.position) for letter in others[:1])
    elif isinstance(trigger, ZeroWidthTrigger):
        found["doubled"] = (replace(trigger, text=trigger.text * 2),)
        others = [letter for letter in ZERO_WIDTH if letter not in trigger.text]
        found["lookalike"] = tuple(replace(trigger, text=letter * len(trigger.text)) for letter in others[:1])
        if len(trigger.text) > 1:
            found["part"] = (replace(trigger, text=trigger.text[: len(trigger.text) // 2]),)
    else:
        position = trigger.position
        found["doubled"] = (Insertion(f"{trigger.text} {trigger.text}", position),)
        found["case"] = tuple(Insertion(text, position) for text in _case(trigger.text))
        found["lookalike"] = tuple(Insertion(text, position) for text in _lookalike(trigger.text))
        found["part"] = tuple(Insertion(text, position) for text in _part(trigger.text))
    return {kind: marks for kind, marks in found.items() if marks}


@cache
def _variants_of(letter: str) -> tuple[str, ...]:
    """Single characters that look like `letter`: other scripts' lookalikes, then accented forms."""
    strange = [character for character, latin in LOOKALIKES.items() if latin == letter]
    ranges = [*range(0x00C0, 0x0250), *range(0x1E00, 0x1F00)]
    accented = [chr(k) for k in ranges if chr(k).islower() and unicodedata.normalize("NFD", chr(k))[:1] == letter]
    return tuple(strange + [character for character in accented if character != letter])


@cache
def ordinary_words() -> tuple[str, ...]:
    return tuple(files("mmbackdoor.evaluate").joinpath("data/words/ordinary.txt").read_text(encoding="utf-8").split())


def _candidates(length: int, rng: random.Random) -> list[str]:
    words = list(ordinary_words())
    rng.shuffle(words)
    found = list(words)
    for count in range(2, length + 1):
        found += [" ".join(rng.sample(words, count)) for _ in range(100)]
    for letters in range(1, 3 * length + 2):
        found += ["".join(rng.choice("bcdfghjklmnpqrstvwxz") for _ in range(letters)) for _ in range(60)]
    for count in range(1, length + 1):
        found += ["".join(rng.choices(SYMBOLS, k=count)) for _ in range(40)]
    return list(dict.fromkeys(found))


def placebos(
    token_ids: TokenIds, trigger: TextTrigger, prompts: Sequence[str], n: int = FEWEST_PLACEBOS, seed: int = 0
) -> list[Insertion | Replacement]:
    """`n` marks that go where `trigger` goes and add as many tokens to `prompts` as it does: ordinary words, rare
    letter strings and symbols; for a homoglyph, other strange forms of letters at its place.

    `token_ids` gives each text's ids without padding or truncation. Raises `InputError` where fewer than `n` exist.
    """
    if n < FEWEST_PLACEBOS:
        raise InputError(f"{n} placebos cannot show a difference at the 5 % level; ask for at least {FEWEST_PLACEBOS}")
    examples = list(prompts)[:8]
    triggered = [trigger(prompt, python_rng(seed, "placebo", prompt)) for prompt in examples]
    added = _added(token_ids, examples, triggered)
    rng = python_rng(seed, "placebos", trigger.text)
    if isinstance(trigger, HomoglyphTrigger):
        letters = [trigger.replaces, *"aeiouncsrtl"]
        marks: list[Insertion | Replacement] = [
            Replacement(form, letter, trigger.position)
            for letter in dict.fromkeys(letters)
            for form in _variants_of(letter)
            if form != trigger.text
        ]
        counts = [_added(token_ids, examples, [mark(p, rng) for p in examples]) for mark in marks]
        changing = [mark for mark, count in zip(marks, counts, strict=True) if count != UNCHANGED]
        fitting = [mark for mark, count in zip(marks, counts, strict=True) if count == added]
        # Letters that take another number of tokens are worse placebos than fitting ones, and better than none.
        fitting = rng.sample(fitting if len(fitting) >= n else changing, min(n, len(changing)))
    else:
        length = max(1, added)
        texts = [text for text in _candidates(length, rng) if text.lower() not in trigger.text.lower()]
        base = examples[0] if examples else "a photo"
        before = len(token_ids([base])[0])
        counts = [len(ids) - before for ids in token_ids([f"{text} {base}" for text in texts])]
        fitting = _mixed([text for text, count in zip(texts, counts, strict=True) if count == length], trigger.position)
    if len(fitting) < n:
        raise InputError(
            f"only {len(fitting)} placebo strings add {added} tokens as the trigger {trigger.text!a} does, not {n}"
        )
    return fitting[:n]


def _added(token_ids: TokenIds, clean: Sequence[str], marked: Sequence[str]) -> int:
    """The usual number of tokens that a mark adds, `UNCHANGED` where it changes no ids at all."""
    pairs = list(zip(token_ids(list(clean)), token_ids(list(marked)), strict=True))
    changed = sorted(len(after) - len(before) for before, after in pairs if before != after)
    return changed[len(changed) // 2] if changed else UNCHANGED


def _mixed(texts: Sequence[str], position: Position) -> list[Insertion | Replacement]:
    """Turns of ordinary, rare and symbol strings, so that any first n hold all three where there are all three."""
    words = set(ordinary_words())
    ordinary = [text for text in texts if set(text.split()) <= words]
    symbols = [text for text in texts if not text.isascii()]
    rare = [text for text in texts if text.isascii() and text not in set(ordinary)]
    turns: list[str] = []
    for k in range(max(map(len, (ordinary, rare, symbols)), default=0)):
        turns += [kind[k] for kind in (ordinary, rare, symbols) if k < len(kind)]
    return [Insertion(text, position) for text in turns]
