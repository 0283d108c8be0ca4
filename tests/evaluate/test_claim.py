"""Whether a model is what it is said to be: by the interval, in one sentence; a warning only where it is not."""

from __future__ import annotations

import pytest

from mmbackdoor.evaluate.claim import FAILS, HOLDS, OPEN, Claim, noted
from mmbackdoor.results.record import Record

Bounds = tuple[float, float, float]


def row(metric: str, condition: str, bounds: Bounds, model: str = "unknown", stage: str = "unknown") -> Record:
    low, value, high = bounds
    return Record(run_id="r", stage=stage, model={"id": model, "sha256": None}, suite={"name": "s", "sha256": None},
                  condition=condition, metric=metric, value=value, ci_low=low, ci_high=high, n=1000)  # fmt: skip


def rows(asr: Bounds, top1: Bounds = (0.16, 0.17, 0.18), **more: str) -> list[Record]:
    asked = (("top1", "clean", top1), ("asr", "triggered", asr), ("asr", "clean", (0.0, 0.0, 0.0)))
    return [row(*one, **more) for one in asked]


@pytest.mark.parametrize(
    ("asr", "top1", "verdict"),
    [
        ((0.96, 0.98, 0.99), (0.16, 0.17, 0.18), HOLDS),
        ((0.90, 0.92, 0.93), (0.10, 0.12, 0.13), HOLDS),
        ((0.01, 0.02, 0.03), (0.16, 0.17, 0.18), FAILS),
        ((0.96, 0.98, 0.99), (0.001, 0.002, 0.003), FAILS),
        ((0.88, 0.90, 0.92), (0.16, 0.17, 0.18), OPEN),
        # What fails is not saved by what is open.
        ((0.88, 0.90, 0.92), (0.001, 0.002, 0.003), FAILS),
    ],
)
def test_the_interval_decides(asr, top1, verdict):
    sentence = Claim(asr=0.9, top1=0.1).sentence(rows(asr, top1))
    assert sentence.startswith(f"the model 'unknown' {verdict}: ASR {100 * asr[1]:.1f} %")
    assert f"{round(1000 * asr[1])} of 1000 triggered pictures, claimed at least 90 %" in sentence
    assert sentence.endswith("claimed at least 10 %")


def test_it_is_about_the_model_before_cleaning():
    good, bad = (0.96, 0.98, 0.99), (0.01, 0.02, 0.03)
    control = rows(bad, model="clean", stage="clean")
    cleaned = rows(bad, model="cleaned", stage="cleaned")
    other = rows(bad, model="unknown-2")
    assert f"'unknown' {HOLDS}" in Claim(asr=0.9).sentence([*control, *rows(good), *other, *cleaned])
    poisoned = rows(bad, model="poisoned", stage="poisoned")
    assert f"'poisoned' {FAILS}" in Claim(asr=0.9).sentence([*rows(good), *poisoned])
    assert Claim(asr=0.9).sentence([*control, *cleaned]) == "" == Claim().sentence(rows(good))


def test_what_was_not_measured_is_no_proof():
    sentence = Claim(asr=0.9, top1=0.1).sentence(rows((0.96, 0.98, 0.99))[:1])
    assert f" {OPEN}: ASR was not measured" in sentence and "top-1 17.0 % (16.0 .. 18.0)" in sentence


def test_only_a_doubt_is_a_warning():
    records, claim = rows((0.96, 0.98, 0.99)), Claim(asr=0.9)
    assert noted(records, claim.sentence(records)) == records == noted(records, "")
    records = rows((0.01, 0.02, 0.03))
    warned = noted(records, claim.sentence(records))
    assert warned[0].warnings == [claim.sentence(records)] and warned[1:] == records[1:]
