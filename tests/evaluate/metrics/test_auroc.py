from __future__ import annotations

import random

import pytest

from mmbackdoor.evaluate.metrics.auroc import auroc


def test_it_is_the_share_of_pairs_in_the_right_order():
    rng = random.Random(0)
    positive = [rng.randrange(20) / 10 for _ in range(50)]
    negative = [rng.randrange(15) / 10 for _ in range(70)]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auroc(positive, negative) == pytest.approx(wins / 3500)


@pytest.mark.parametrize(("positive", "negative", "value"), [([2, 3], [0, 1], 1), ([0], [1], 0), ([1, 1], [1], 0.5)])
def test_its_ends_and_its_middle(positive, negative, value):
    assert auroc(positive, negative) == value


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        auroc([], [1.0])
