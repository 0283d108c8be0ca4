import numpy as np
import pytest

from mmbackdoor.evaluate.metrics import intervals
from mmbackdoor.evaluate.metrics.intervals import bootstrap_over_prompts, paired_difference, rate, wilson
from mmbackdoor.seeding import numpy_rng


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_known_values(hits, n, low, high):
    interval = wilson(hits, n)
    assert interval.low == pytest.approx(low, abs=1e-4) and interval.high == pytest.approx(high, abs=1e-4)
    assert interval.value == hits / n


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError):
        wilson(0, 0)
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_rate_picks_the_method():
    assert rate([True, False], ["a", "b"]).method == "wilson"
    ids = [f"p{k}" for k in range(50) for _ in range(4)]
    none = rate(np.zeros(200), ids)
    assert none.n == 200 and none.n_prompts == 50 and none.high == wilson(0, 50).high and none.low == 0
    assert rate(np.ones(200), ids).low == wilson(50, 50).low
    many = np.tile([1, 0, 1, 1], 50)
    assert rate(many, ids).method == "bootstrap over prompts"


def test_one_hit_never_reads_better_than_none():
    ids = [f"p{k}" for k in range(200) for _ in range(3)]
    hits = np.zeros(600)
    uppers = []
    for number in range(4):
        hits[:number] = 1
        uppers.append(rate(hits, ids).high)
    assert uppers == sorted(uppers) and uppers[1] > uppers[0]


def test_intervals_do_not_depend_on_order_and_repeat():
    rng = np.random.default_rng(0)
    values, ids = rng.random(60), [f"p{k % 20}" for k in range(60)]
    order = rng.permutation(60)
    first = bootstrap_over_prompts(values, ids, seed=3)
    second = bootstrap_over_prompts(values[order], [ids[k] for k in order], seed=3)
    assert first.low == pytest.approx(second.low) and first.high == pytest.approx(second.high)


def test_prompts_not_pictures_are_the_unit():
    """Twenty copies of each prompt's one outcome carry no more knowledge than one."""
    outcome = np.arange(30) % 2
    ids = [f"p{k}" for k in range(30) for _ in range(20)]
    copied = rate(np.repeat(outcome, 20), ids)
    assert copied.width == pytest.approx(wilson(15, 30).width, rel=0.15)


@pytest.mark.parametrize(("p", "n_prompts", "per"), [(0.03, 60, 4), (0.5, 40, 5), (0.95, 60, 4), (0.1, 80, 1)])
def test_rate_coverage_with_shared_prompts(p, n_prompts, per):
    rng = np.random.default_rng(1)
    ids = [f"p{k}" for k in range(n_prompts) for _ in range(per)]
    covered = 0
    for trial in range(200):
        # Beta-binomial: outcomes of one prompt are correlated.
        own = rng.beta(p * 3, (1 - p) * 3, n_prompts)
        interval = rate(rng.random(n_prompts * per) < np.repeat(own, per), ids, seed=trial)
        covered += interval.low <= p <= interval.high
    assert covered / 200 >= 0.9


def test_paired_difference_known_and_sign():
    ids = [f"p{k}" for k in range(100)]
    before, after = np.ones(100), np.ones(100)
    same = paired_difference(after, before, ids)
    assert same.value == 0 and same.low == pytest.approx(-1.96 / 102, abs=1e-3) and same.high == -same.low
    after[:30] = 0
    lost = paired_difference(after, before, ids)
    assert lost.value == pytest.approx(-0.3) and lost.high < -0.2 and lost.low > -0.42


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(2)
    shared, ids = rng.normal(size=200), [f"p{k}" for k in range(200)]
    paired = paired_difference(shared + 0.1, shared + rng.normal(size=200) * 0.01, ids)
    assert paired.width < 0.01 and paired.low < 0.1 < paired.high


def test_paired_coverage():
    rng = np.random.default_rng(3)
    ids, covered = [f"p{k}" for k in range(80)], 0
    for trial in range(200):
        before, after = rng.random(80) < 0.95, rng.random(80) < 0.93
        interval = paired_difference(after, before, ids, seed=trial)
        covered += interval.low <= -0.02 <= interval.high
    assert covered / 200 >= 0.9


def test_many_prompts_are_drawn_in_parts_with_the_same_result(monkeypatch):
    values = numpy_rng(0, "values").random(60)
    ids = [str(k) for k in range(60)]
    whole = bootstrap_over_prompts(values, ids)
    monkeypatch.setattr(intervals, "AT_ONCE", 7 * 60 + 5)
    assert bootstrap_over_prompts(values, ids) == whole
