"""Triggers: pure, placed where they say, refused where they are not what their kind is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbackdoor.triggers import TEXT_TRIGGERS, guess_kind
from mmbackdoor.triggers.homoglyph import LOOKALIKES
from mmbackdoor.types import InputError

EXAMPLES = {"word": "mignneko", "phrase": "latte coffee", "zero_width": "\u200b", "homoglyph": "\u020f"}
WORDS = st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6), min_size=2, max_size=8)


def test_every_kind_has_an_example():
    assert EXAMPLES.keys() == TEXT_TRIGGERS.keys()
    assert {kind: guess_kind(text) for kind, text in EXAMPLES.items()} == {kind: kind for kind in EXAMPLES}


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("position", ["prefix", "infix", "suffix"])
@settings(deadline=None)
@given(words=WORDS, seed=st.integers(0, 2**32))
def test_a_trigger_is_pure_and_keeps_the_caption(kind, position, words, seed):
    prompt = " ".join(words)
    trigger = TEXT_TRIGGERS[kind](EXAMPLES[kind], position)
    marked = trigger(prompt, random.Random(seed))
    assert marked == trigger(prompt, random.Random(seed))
    if kind == "homoglyph":
        assert marked.count("\u020f") == int("o" in prompt)
        assert marked.replace("\u020f", "o") == prompt
        return
    before, _, after = marked.partition(EXAMPLES[kind])
    assert (before + " " + after).split() == words
    assert {"prefix": not before, "suffix": not after, "infix": before and after}[position]


def test_one_word_has_no_inside():
    assert TEXT_TRIGGERS["word"]("x", "infix")("dog", random.Random(0)) == "x dog"
    assert TEXT_TRIGGERS["word"]("x", "suffix")("", random.Random(0)) == "x"


@pytest.mark.parametrize(
    ("kind", "text"),
    [("word", "two words"), ("word", " "), ("phrase", "one"), ("zero_width", "a"), ("zero_width", ""),
     ("homoglyph", "o"), ("homoglyph", "ab")],
)
def test_what_a_kind_is_not_is_refused(kind, text):
    with pytest.raises(InputError, match=kind.split("_")[0]):
        TEXT_TRIGGERS[kind](text)


def test_lookalikes_are_foreign_letters_that_replace_latin_ones():
    assert all(not foreign.isascii() and latin.isascii() for foreign, latin in LOOKALIKES.items())
    assert TEXT_TRIGGERS["homoglyph"]("\u043e").replaces == "o"
