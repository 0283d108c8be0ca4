"""The statistics of timing: who is taken when, what a round gives, what counts."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mmbackdoor.speed import bench as bench_module
from mmbackdoor.speed.bench import Bench
from mmbackdoor.speed.memory import peak_bytes
from mmbackdoor.speed.rows import Goal, Where, compared, publish, read
from mmbackdoor.speed.timing import Spread, Timed, exponent, interleaved, ratios
from mmbackdoor.types import RunFault

WHERE = Where("tiny", "cpu", "fp32", 1)


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Timed:
        following = iter(seconds)

        def act() -> None:
            self.seen.append(name)
            self.now += next(following)

        return Timed(act)


def test_contestants_take_turns_and_warm_up_does_not_count():
    clock = Clock()
    timed = {"a": clock.work("a", 9, 1, 2, 3), "b": clock.work("b", 8, 10, 20, 30)}
    assert interleaved(timed, 3, warmup=1, clock=clock) == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert clock.seen == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_round_of_several_calls_gives_the_seconds_of_one():
    clock = Clock()
    assert interleaved({"a": clock.work("a", 1, 2, 3, 6)}, 2, warmup=0, calls=2, clock=clock) == {"a": [1.5, 4.5]}


def test_a_free_number_of_calls_fills_half_a_second_and_is_agreed_on():
    clock, asked = Clock(), []

    def agree(count: int) -> int:
        asked.append(count)
        return min(count, 4)

    timed = {"a": clock.work("a", 7.0, *[0.1] * 5), "b": clock.work("b", *[3.0] * 3)}
    found = interleaved(timed, 1, warmup=2, calls=None, agree=agree, clock=clock)
    assert sorted(asked) == [1, 5] and found == {"a": [pytest.approx(0.1)], "b": [pytest.approx(3.0)]}
    assert clock.seen.count("a") == 2 + 4 and clock.seen.count("b") == 2 + 1
    assert interleaved({"a": clock.work("a", 0.01)}, 1, warmup=0, calls=None, clock=clock)["a"] == [pytest.approx(0.01)]


def test_what_is_around_is_not_timed_and_what_runs_in_the_background_is():
    clock, log = Clock(), []

    @contextmanager
    def around():
        clock.now += 100
        log.append("in")
        yield
        clock.now += 100
        log.append("out")

    def settle() -> None:
        clock.now += 0.25
        log.append("settled")

    timed = {"a": Timed(clock.work("a", 1, 1).act, around)}
    assert interleaved(timed, 2, warmup=0, settle=settle, clock=clock) == {"a": [1.25, 1.25]}
    assert log == ["in", "settled", "settled", "out"] * 2


def test_ratios_are_those_of_a_round():
    assert ratios([2.0, 6.0, 5.0], [1.0, 2.0, 5.0]) == Spread(2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_the_exponent_is_that_of_a_power_law():
    assert exponent([1, 2, 4, 8], [3 * size**1.7 for size in (1, 2, 4, 8)]) == pytest.approx(1.7)
    assert exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    with pytest.raises(ValueError, match="1 sizes give no slope"):
        exponent([2, 2], [1, 3])


def test_goals_are_judged_by_the_median_in_their_own_direction():
    slow = compared("m", "a", [1.2, 1.0, 1.1], "floor", [1.0, 1.0, 1.0], WHERE, goal=Goal(1.1))
    assert (slow.ratio, slow.ratio_low, slow.ratio_high, slow.reached) == (1.1, 1.0, 1.2, True)
    assert (slow.ratio_of, slow.goal, slow.n, slow.ours, slow.peer) == ("ours / peer", "<= 1.1", 3, 1.1, 1.0)
    fast = compared("m", "b", [1.0, 1.0], "peer", [2.0, 3.0], WHERE, goal=Goal(3, at_most=False))
    assert (fast.ratio, fast.ratio_of, fast.reached) == (2.5, "peer / ours", False)
    assert compared("m", "c", [1.0], "peer", [4.0], WHERE, times_less=True).ratio == 4.0
    assert compared("m", "d", [1.0], "peer", [4.0], WHERE).reached is None


def test_rows_are_read_back_and_shown(tmp_path):
    rows = [
        compared("m", "a", [1.5], "floor", [1.0], WHERE, goal=Goal(1.05), note="batch 4"),
        compared("m", "b", [1.0], "plain", [6.0], WHERE, goal=Goal(5, at_most=False)),
    ]
    shown = publish(tmp_path, rows)
    assert read(tmp_path / "results.jsonl") == rows
    assert (tmp_path / "table.md").read_text() == shown.markdown() + "\n"
    first, second = shown.rows
    assert first[4:8] == ("1.5 (1.5 .. 1.5)", "<= 1.05", "no", "1") and first[-1] == "batch 4"
    assert second[4:7] == ("6 times less (6 .. 6)", ">= 5", "yes") and second[8] == "tiny, cpu, fp32, 1 threads"


def hold(mebibytes: int):
    kept = torch.ones(mebibytes, 2**20, dtype=torch.uint8)
    return lambda: kept.clone()


def die():
    raise SystemExit(3)


def test_peak_memory_is_that_of_the_work_alone():
    small, large = (peak_bytes(hold, size) / 2**20 for size in (16, 144))
    # Each holds its tensor and the copy that the call makes.
    assert 2 * 128 - 24 < large - small < 2 * 128 + 24


def test_a_process_that_dies_is_a_fault():
    with pytest.raises(RunFault, match="measuring the memory of die ended with exit code 3"):
        peak_bytes(die)


def test_a_profile_is_written_by_the_first_process_alone(tmp_path, monkeypatch):
    calls = []
    for first in (False, True):
        monkeypatch.setattr(bench_module, "PartialState", lambda first=first: SimpleNamespace(is_main_process=first))
        before = len(calls)
        Bench(profile=True).look_into({"floor": Timed(lambda: calls.append(1))}, tmp_path, "skd")
        assert len(calls) > before, "every process takes part, for the exchanges within"
        assert (tmp_path / "profile/skd-floor.txt").is_file() == first


def test_a_profile_names_the_longest_operations(tmp_path):
    matrix, entered = torch.rand(300, 300), []

    @contextmanager
    def around():
        entered.append(True)
        yield

    timed = {"floor": Timed(lambda: matrix @ matrix), "our step": Timed(lambda: matrix.exp(), around)}
    Bench().look_into(timed, tmp_path, "skd")
    assert not (tmp_path / "profile").exists() and not entered
    Bench(profile=True).look_into(timed, tmp_path, "skd")
    found = {path.name: path.read_text() for path in (tmp_path / "profile").iterdir()}
    assert found.keys() == {"skd-floor.txt", "skd-our_step.txt"} and len(entered) == 1
    assert "aten::mm" in found["skd-floor.txt"] and "aten::exp" in found["skd-our_step.txt"]
