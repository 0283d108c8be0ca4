"""The numbers of a frontier, against small cases that can be read off by eye."""

from __future__ import annotations

import random

import pytest

from mmbackdoor.results.frontier import (
    BestUtility,
    LargestDrift,
    Point,
    Sight,
    accuracy_at,
    area,
    blind,
    frontier,
    lowest_asr,
    oracle,
    over_seeds,
    share_of_runs,
)


def point(asr: float, accuracy: float, run: str = "a", step: int = 1, drift: float = 0.0, utility: float = -1) -> Point:
    return Point(asr, accuracy, Sight(run, step, accuracy if utility < 0 else utility, drift))


START = point(1.0, 0.80, "poisoned", 0)
POINTS = [
    point(0.90, 0.82, "a", 1, 0.01),
    point(0.20, 0.79, "a", 2, 0.05),
    point(0.04, 0.60, "a", 3, 0.30),
    point(0.05, 0.70, "b", 1, 0.20),
    point(0.50, 0.81, "c", 1, 0.02),
]


def test_levels_include_their_bound_and_miss_where_nothing_got_there():
    assert [accuracy_at(POINTS, level) for level in (0.03, 0.05, 0.10, 0.20, 1)] == [None, 0.70, 0.70, 0.79, 0.82]
    assert [lowest_asr(POINTS, 0.80, loss) for loss in (0.0, 0.01, 0.10, 0.20)] == [0.50, 0.20, 0.05, 0.04]
    assert lowest_asr(POINTS[2:4], 0.80, 0.05) is None
    assert accuracy_at([point(0.1 + 0.2, 0.5)], 0.3) == 0.5, "rates are quotients: the bound forgives their rounding"


def test_area_is_nothing_for_no_cleaning_and_one_for_perfect_cleaning():
    assert area([START], START) == 0 == area([], START)
    assert area([point(0.0, 0.80)], START) == pytest.approx(1)
    assert area([point(0.0, 0.84)], START) == pytest.approx(1.05)
    assert area([point(0.5, 0.80)], START) == pytest.approx(0.5)
    # By hand: 0 up to 0.04, .60 up to 0.05, .70 up to 0.20, .79 up to 0.50, .81 up to 0.90, .82 up to 1.
    by_hand = (0.01 * 0.60 + 0.15 * 0.70 + 0.30 * 0.79 + 0.40 * 0.81 + 0.10 * 0.82) / 0.80
    assert area(POINTS, START) == pytest.approx(by_hand)
    half = point(0.5, 0.80, "poisoned")
    assert area([point(0.25, 0.80)], half) == pytest.approx(0.5) and area([half], half) == 0
    assert area(POINTS, point(0.0, 0.8)) == 0, "nothing to remove"


def test_no_number_depends_on_the_order_and_more_points_never_lower_it():
    rng = random.Random(0)
    for _ in range(50):
        points = [point(rng.random(), rng.random(), rng.choice("abc")) for _ in range(8)]
        shuffled = rng.sample(points, 8)
        assert area(points, START) == pytest.approx(area(shuffled, START))
        assert oracle(points) == oracle(shuffled)
        assert area(points, START) >= area(points[:4], START) - 1e-12
        assert (accuracy_at(points, 0.3) or 0) >= (accuracy_at(points[:4], 0.3) or 0)


def test_a_run_succeeds_with_one_checkpoint_that_is_clean_and_good():
    assert share_of_runs(POINTS, 0.80) == 0, "ASR fell far enough only where accuracy did too"
    assert share_of_runs(POINTS, 0.80, loss=0.10) == pytest.approx(1 / 3)
    assert share_of_runs(POINTS, 0.80, most=0.5, loss=0.05) == pytest.approx(2 / 3)


def test_the_oracle_takes_the_best_accuracy_that_is_clean_enough():
    assert oracle(POINTS) is POINTS[3]
    assert oracle(POINTS[:2]) is POINTS[1], "none is clean: the cleanest"
    equal = [point(0.04, 0.7, step=1), point(0.01, 0.7, step=2)]
    assert oracle(equal) is equal[1]


def test_blind_rules_see_no_asr():
    assert not {"asr", "accuracy"} & set(Sight.__dataclass_fields__)
    worse = [Point(1 - one.asr, one.accuracy, one.seen) for one in POINTS]
    for rule in (LargestDrift(), LargestDrift(budget=0.1), BestUtility()):
        assert blind(POINTS, START.seen, rule).seen is blind(worse, START.seen, rule).seen


def test_the_largest_drift_within_the_budget_is_taken():
    assert blind(POINTS, START.seen, LargestDrift(budget=0.02)) is POINTS[1]
    assert blind(POINTS, START.seen, LargestDrift(budget=0.10)) is POINTS[3]
    assert blind(POINTS, START.seen, LargestDrift(budget=0.50)) is POINTS[2]
    assert blind(POINTS[2:4], START.seen, LargestDrift(budget=0.02)) is POINTS[3], "all lost too much: the best that is left"
    assert blind(POINTS, START.seen, BestUtility()) is POINTS[0]
    admitted = [frontier(some, START, LargestDrift(budget=0.02)).admitted for some in (POINTS, POINTS[2:4], POINTS[:2])]
    assert admitted == [True, False, True], "what is picked where all lost too much is told apart"
    assert frontier(POINTS[2:4], START, BestUtility()).admitted and "where none lost so little" in LargestDrift().words
    selection = [point(0.0, 0.9, utility=0.5, drift=0.9), point(1.0, 0.1, utility=0.8, drift=0.1)]
    assert blind(selection, START.seen, LargestDrift()) is selection[1], "utility is not the evaluation's accuracy"


def test_the_frontier_of_one_model():
    found = frontier(POINTS, START, LargestDrift())
    assert (found.checkpoints, found.runs, found.succeeded) == (5, 3, 0)
    assert found.accuracy_at == (0.70, 0.70, 0.79) and found.lowest_asr == (0.20, 0.20, 0.20)
    assert found.oracle is POINTS[3] and found.blind is POINTS[1]
    with_failed = frontier(POINTS, point(1.0, 0.74), LargestDrift(), failed=2)
    assert (with_failed.runs, with_failed.succeeded) == (5, pytest.approx(1 / 5)), "a run that broke off counts"
    with pytest.raises(ValueError, match="at least one"):
        frontier([], START, LargestDrift())
    lost = frontier([], START, LargestDrift(), failed=2)
    assert (lost.runs, lost.checkpoints, lost.succeeded, lost.area, lost.oracle, lost.blind) == (2, 0, 0, 0, None, None)
    assert set(lost.accuracy_at) == set(lost.lowest_asr) == {None} and not lost.admitted


def test_intervals_over_seeds_are_students():
    found = over_seeds([0.1, 0.2, 0.3])
    # t(2, 97.5 %) = 4.303, standard deviation 0.1.
    assert found.mean == pytest.approx(0.2) and found.high - 0.2 == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert found.low == pytest.approx(0.4 - found.high) and (found.reached, found.n) == (3, 3)
    equal = over_seeds([0.0, 0.0, 0.0])
    assert (equal.mean, equal.low, equal.reached) == (0, None, 3), "three seeds that agree bound nothing"
    assert over_seeds([0.5]).low is None and over_seeds([0.5]).mean == 0.5
    missing = over_seeds([None, 0.5, 0.7])
    assert (missing.reached, missing.n) == (2, 3) and missing.mean == pytest.approx(0.6)
    assert over_seeds([None, None]).mean is None
    assert over_seeds([0.0, 1.0] * 40).high < 0.62
