"""Tokens paired one to one: aligned ones first, then what is left."""

from __future__ import annotations

from collections import Counter

import pytest

from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.models.token_pairs import one_to_one, token_pairs


def test_what_is_not_aligned_is_paired_in_order():
    assert one_to_one([0, 1, 2], [0, 2, 3], 6) == [0, 3, 1, 2, 4, 5]
    assert one_to_one([], [], 3) == [0, 1, 2]


TRIGGERED = ["\u200b a red cross", "a red mignneko cross", "a red cr\u020fss", "a red cross latte coffee"]


@pytest.mark.parametrize("triggered", TRIGGERED)
def test_every_place_is_paired_once_and_the_same_tokens_meet(triggered):
    model = load(shipped("tiny"))
    clean = "a red cross"
    places = token_pairs(model, [clean], [triggered])[0]
    assert sorted(places) == list(range(model.max_length))
    ids, marked = model.token_ids([clean, triggered]).tolist()
    met = [marked[place] == ids[other] for place, other in enumerate(places)]
    # Only what the one has and the other has not meets something else.
    assert met.count(False) == (Counter(marked) - Counter(ids)).total()
    # Paddings far behind both captions meet those at their own place.
    assert places[-3:] == list(range(model.max_length))[-3:]
