"""How trials are tuned: attacks of any length count, each sum has as many terms, nothing drops out of the choice."""

from __future__ import annotations

import pytest

from mmbackdoor.evaluate.removal_points import Seen, tuned_trials, unmeasured, utility_of
from mmbackdoor.results.removal_benchmark import NONE, Where
from mmbackdoor.types import InputError

N = 20


def seen(attack: str, step: int, asr: float | None, seed: int = 7, utility: str | None = "adherence") -> Seen:
    """A model that fires on `asr` of its prompts; after 0 steps it is the poisoned one."""
    values = {("asr", "triggered"): {(f"p{k}", 0): float(k < asr * N) for k in range(N)}} if asr is not None else {}
    for condition in ("clean", "triggered") if utility else ():
        values[utility, condition] = {(f"p{k}", 0): 1.0 for k in range(N)}
    stage = "cleaned" if step else "poisoned"
    return Seen(Where(attack=attack, removal="skd" if step else NONE, stage=stage, step=step), seed, values)


def tuned(trials, poisoned=None, milestones=()):
    before = poisoned or [seen("patch", 0, 1.0), seen("object", 0, 1.0)]
    return tuned_trials("skd", trials, before, milestones, ("clean", "triggered"))


def test_every_sum_has_as_many_terms_whatever_the_length_of_a_trial():
    short = [seen("patch", 10, 0.5), seen("patch", 20, 0.2)]
    long = [seen("patch", 10, 0.5), seen("patch", 20, 0.2), seen("patch", 40, 0.2)]
    lines = tuned([({}, short, None), ({}, long, None)], [seen("patch", 0, 1.0)], [10, 20])
    assert [one.asr for one in lines] == [{"10": 0.5, "20": 0.2, "40": 0.2}] * 2
    assert lines[0].asr_sum == lines[1].asr_sum == pytest.approx(0.9), "the longer one is no worse for its length"


def test_each_attack_counts_to_its_own_end():
    found = [seen("patch", 10, 0.5), seen("patch", 40, 0.0), seen("object", 10, 1.0), seen("object", 60, 0.4)]
    [line] = tuned([({}, found, None)], milestones=[10])
    # At 60 steps the patch attack's model still is what it was at 40.
    assert line.asr == {"10": 0.75, "60": pytest.approx(0.2)}
    assert all(low < line.asr[step] < high for step, (low, high) in line.asr_bounds.items())
    assert line.asr_bounds.keys() == line.asr.keys()
    assert line.n == 2 * N and line.attacks == ("patch", "object") and line.change["clean"][0] == 0


def test_a_trial_that_broke_off_says_where():
    [line] = tuned([({"learning_rate": 2.0}, [seen("patch", 40, 0.0)], "object, seed 7: the loss is nan")])
    assert line.error == "object, seed 7: the loss is nan" and not line.asr
    assert (line.attacks, line.seeds) == (("patch", "object"), (7,))


def test_an_attack_that_cannot_be_judged_is_refused_and_not_left_out():
    with pytest.raises(InputError, match="ASR of style, seed 7 cannot be measured.*give evaluate.judge"):
        utility_of([seen("patch", 0, 1.0), seen("style", 0, None)])
    with pytest.raises(InputError, match="patch, seed 7, style, seed 7.*give evaluate.judge"):
        utility_of([seen("patch", 0, 1.0), seen("style", 0, 1.0, utility=None)])
    scored = seen("style", 0, 1.0, utility="clip_score")
    with pytest.raises(InputError, match="neither adherence nor CLIP scores"):
        utility_of([seen("patch", 0, 1.0), scored])
    assert utility_of([scored]) == "clip_score" and utility_of([seen("patch", 0, 1.0)]) == "adherence"


def test_a_trial_with_nothing_but_blank_pictures_has_no_low_asr():
    blank = [seen("patch", 40, 0.3), seen("object", 40, None)]
    assert unmeasured(blank, "adherence") == "object, seed 7: no picture with the trigger counts for asr after 40 steps"
    [line] = tuned([({}, blank, None)])
    assert line.error == unmeasured(blank, "adherence") and not line.asr
