from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import PatchTarget
from mmbackdoor.triggers import WordTrigger
from mmbackdoor.types import InputError

BACKDOOR = Backdoor((WordTrigger("mignneko"),), PatchTarget())
KEYS = [f"{number:08d}" for number in range(20_000)]
# Written down once: a poisoned data set must be recognised by every later version.
CHOSEN = ["00005903", "00018747", "00019050"]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 1.0])
def test_the_share_is_the_rate(rate):
    plan = PoisonPlan(BACKDOOR, rate=rate)
    share = sum(map(plan.picks, KEYS)) / len(KEYS)
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / len(KEYS)) ** 0.5
    assert plan.choose(KEYS) == frozenset(key for key in KEYS if plan.picks(key))


def test_the_choice_does_not_depend_on_the_order_of_keys():
    mixed = random.Random(0).sample(KEYS, len(KEYS))
    plan = PoisonPlan(BACKDOOR, count=37, seed=4)
    assert plan.choose(KEYS) == plan.choose(mixed) and len(plan.choose(KEYS)) == 37


def test_plans_of_a_seed_are_nested_and_seeds_differ():
    low, high = PoisonPlan(BACKDOOR, count=50).choose(KEYS), PoisonPlan(BACKDOOR, count=100).choose(KEYS)
    assert low < high < PoisonPlan(BACKDOOR, rate=0.02).choose(KEYS)
    assert PoisonPlan(BACKDOOR, count=50, seed=1).choose(KEYS) != low


def test_the_choice_is_the_same_in_another_process_and_release():
    chosen = sorted(PoisonPlan(BACKDOOR, count=3).choose(KEYS))
    code = "from tests.test_poison import *; print(','.join(sorted(PoisonPlan(BACKDOOR, count=3).choose(KEYS))))"
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[1]}
    found = subprocess.run([sys.executable, "-c", code], check=True, **options).stdout.strip()
    assert found.split(",") == chosen == CHOSEN


def test_round_trip_through_json():
    for plan in (PoisonPlan(BACKDOOR, rate=0.1, seed=3), PoisonPlan(BACKDOOR, count=5)):
        assert PoisonPlan.from_dict(json.loads(json.dumps(plan.to_dict())), BACKDOOR) == plan


def test_wrong_plans_are_input_errors():
    for values in ({}, {"rate": 0.1, "count": 3}, {"rate": 1.5}, {"rate": float("nan")}, {"count": -1}):
        with pytest.raises(InputError):
            PoisonPlan(BACKDOOR, **values)
    with pytest.raises(InputError, match="more than the 2"):
        PoisonPlan(BACKDOOR, count=3).choose(["a", "b", "a"])
    with pytest.raises(ValueError, match="choose"):
        PoisonPlan(BACKDOOR, count=3).picks("a")
    other = Backdoor((WordTrigger("zxqv"),), PatchTarget())
    good = PoisonPlan(BACKDOOR, rate=0.1).to_dict()
    for values in (good | {"rate": "0.1"}, good | {"more": 1}, [], good | {"seed": None}):
        with pytest.raises(InputError):
            PoisonPlan.from_dict(values, BACKDOOR)
    with pytest.raises(InputError, match="another backdoor"):
        PoisonPlan.from_dict(good, other)
