"""Removals compared: pooling over seeds, the rule of tuning, tables, warnings, the page and the picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbackdoor.cli import main
from mmbackdoor.evaluate.metrics.intervals import rate, wilson
from mmbackdoor.evaluate.removal_points import Seen, points
from mmbackdoor.results import removal_benchmark, removal_report, removal_tuning
from mmbackdoor.results.removal_benchmark import CLEAN, NONE, Point, RemovalRun, Where
from mmbackdoor.results.removal_curves import curve, curves
from mmbackdoor.results.removal_grid import Attack, check_names, milestones_of
from mmbackdoor.results.removal_pooling import pooled_difference, pooled_mean, pooled_rate
from mmbackdoor.results.removal_tuning import LowestASR, TunedTrial, Tuning, moments, with_winners
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.types import InputError


def trials(*hits: int, n: int = 60) -> dict[tuple[str, str, int], float]:
    """`hits[s]` ones among `n` prompts of seed s."""
    return {(str(s), f"p{k}", 0): float(k < count) for s, count in enumerate(hits) for k in range(n)}


def test_one_seed_is_an_evaluation_of_its_own():
    one = trials(7)
    assert pooled_rate(one) == rate(list(one.values()), [prompt for _, prompt, _ in one])


def test_seeds_are_more_trials_where_their_prompts_differ_alone():
    same, apart = pooled_rate(trials(20, 20, 20)), pooled_rate(trials(0, 0, 60))
    assert same.value == apart.value == pytest.approx(1 / 3) and (same.n, same.n_prompts) == (180, 60)
    # The same 20 prompts fire in every seed: nothing is known of more than 60 prompts.
    assert same.width > 0.95 * wilson(20, 60).width
    own = {(seed, f"{seed} {prompt}", k): value for (seed, prompt, k), value in trials(20, 20, 20).items()}
    assert pooled_rate(own).width < 0.8 * same.width, "each seed its own prompts"
    # Two of three seeds are clean: one that is drawn three times makes everything fire, or nothing.
    assert apart.low == 0 and apart.high > 0.9 and "seeds" in apart.method


def test_no_hit_in_any_seed_is_as_sure_as_its_different_prompts():
    # Three poisonings show that these 60 prompts do not fire, and nothing of a 61st: it is as if they were asked once.
    none, all_of_them = pooled_rate(trials(0, 0, 0)), pooled_rate(trials(60, 60, 60))
    assert none.high == wilson(0, 60).high and all_of_them.low == wilson(60, 60).low
    assert (none.n, none.n_prompts, none.method) == (180, 60, "wilson on prompts")
    other = {(seed, f"{seed} {prompt}", k): value for (seed, prompt, k), value in trials(0, 0, 0).items()}
    assert pooled_rate(other).high == pytest.approx(wilson(0, 180).high), "each seed its own prompts"


def test_a_change_is_no_surer_for_being_seen_in_more_seeds_of_the_same_prompts():
    was = trials(*[50] * 5, n=50)
    now = {key: value * (key[1] != "p0") for key, value in was.items()}
    for after in (now, was):
        every = pooled_difference(after, was)
        first = pooled_difference(*({key: of[key] for key in of if key[0] == "0"} for of in (after, was)))
        assert (every.value, every.n, every.n_prompts) == (pytest.approx(first.value), 250, 50)
        assert (every.low, every.high) == pytest.approx((first.low, first.high)) and every.high > 0


def test_intervals_of_crossed_seeds_and_prompts_hold_the_truth_often_enough():
    rng, held, n = numpy_rng(3, "coverage"), 0, 60
    for _ in range(n):
        prompts, seeds = rng.normal(0, 0.15, 40), rng.normal(0, 0.05, 4)
        chance = np.clip(0.5 + prompts[None] + seeds[:, None], 0, 1)
        values = rng.random(chance.shape) < chance
        found = pooled_rate({(str(s), f"p{k}", 0): float(values[s, k]) for s in range(4) for k in range(40)})
        held += found.low <= 0.5 <= found.high
    assert held >= 0.9 * n


def test_one_hit_never_reads_better_than_none():
    none, one, two = (pooled_rate(trials(*hits)) for hits in ((0, 0, 0), (1, 0, 0), (1, 1, 0)))
    assert none.high < one.high <= two.high and one.low == 0


def test_differences_are_paired_by_seed_and_prompt():
    was, now = trials(50, 30), trials(48, 28)
    found = pooled_difference(now, was)
    assert found.value == pytest.approx(-4 / 120) and found.low < -4 / 120 < found.high <= 0.025
    shifted = {(f"other {seed}", prompt, k): value for (seed, prompt, k), value in was.items()}
    assert pooled_difference(now, shifted) is None
    assert pooled_difference(now, now).value == 0


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=12), min_size=1, max_size=4),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_intervals_hold_their_value_and_know_no_order(seeds, repeats, random):
    given_ = {
        (str(s), f"p{k}", r): float(value)
        for s, of in enumerate(seeds) for k, value in enumerate(of) for r in range(repeats)
    }  # fmt: skip
    shuffled = list(given_.items())
    random.shuffle(shuffled)
    for pool in (pooled_rate, pooled_mean):
        found = pool(given_)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.value == pytest.approx(np.mean(list(given_.values())))
        again = pool(dict(shuffled))
        assert (again.low, again.high) == pytest.approx((found.low, found.high))
        assert found.n == len(given_) and found.n_prompts == max(map(len, seeds))


def trial(number: int, asr: float, low: float, level: float = 0.9, **more: object) -> TunedTrial:
    change = {name: (low + 0.02, low, low + 0.04) for name in ("clean", "triggered")}
    facts = {"removal": "skd", "trial": number, "settings": {}, "attacks": ("patch",), "seeds": (9,), "n": 40}
    facts |= {"utility": "adherence", "level": level, "asr": {"5": asr}, "asr_bounds": {"5": (0.0, 0.6)}}
    return TunedTrial(**facts | {"change": change} | more)


def test_the_rule_takes_the_lowest_asr_of_those_that_kept_the_model():
    rule = LowestASR()
    assert rule([trial(0, 0.5, -0.02), trial(1, 0.2, -0.04), trial(2, 0.0, -0.041)]).trial == 1
    assert rule([trial(0, 0.2, -0.02, 0.90), trial(1, 0.2, -0.03, 0.95)]).trial == 1, "ties: the higher adherence"
    assert rule([trial(0, 0.2, -0.3, 0.60), trial(1, 0.9, -0.2, 0.70)]).trial == 1, "none qualifies"
    half = trial(1, 0.0, -0.02, change={"clean": (0, -0.01, 0.01), "triggered": (-0.5, -0.6, -0.4)})
    assert rule([trial(0, 0.5, -0.02), half]).trial == 0, "broken pictures with the trigger are no removal"
    assert LowestASR(conditions=("clean",))([trial(0, 0.5, -0.02), half]).trial == 1
    assert rule([trial(0, 0.0, 0.0, error="nan"), trial(1, 0.9, 0.0)]).trial == 1
    with pytest.raises(InputError, match="every trial of 'skd' broke off .nan"):
        rule([trial(0, 0.0, 0.0, error="nan")])
    assert "-4 points" in rule.words and "lowest ASR summed" in rule.words
    assert rule.words.startswith("an oracle") and "CLIP scores are all there is, their change at least -0.02" in rule.words


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(-0.2, 0.1), st.floats(0, 1)), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_no_qualifying_trial_beats_the_winner(numbers):
    some, rule = [trial(k, *of) for k, of in enumerate(numbers)], LowestASR()
    winner, good = rule(some), [one for one in some if rule.kept(one)]
    if good:
        assert winner in good and all(winner.asr_sum <= one.asr_sum + 1e-8 for one in good)
    else:
        assert winner.level == max(one.level for one in some)
        assert winner.asr_sum == min(one.asr_sum for one in some if one.level == winner.level)
    marked = with_winners([*some, *(replace(one, removal="other") for one in some)], rule)
    assert [one.removal for one in marked if one.winner] == ["skd", "other"]
    assert [one.kept for one in marked[: len(some)]] == [one in good for one in some]


def test_every_trial_is_looked_at_after_the_same_steps():
    assert moments([5, 20], 10) == (5, 20) and moments([5], 20) == (5, 20) and moments([], 20) == (20,)
    assert moments([20, 5, 5], 40) == (5, 20, 40) and moments([5, 20], 0) == (5, 20), "in closed form"
    assert milestones_of([40, 5, 5, 20], 20) == (5,)


def test_tuning_is_fair_or_refused():
    even = Tuning(trials={"skd": ({}, {}), "finetune": ({}, {})})
    even.check(["skd", "finetune"], [0], ["patch"])
    with pytest.raises(InputError, match="not skd 2, finetune 2, cag 0"):
        even.check(["skd", "finetune", "cag"], [0], ["patch"])
    with pytest.raises(InputError, match="names 'finetune'"):
        even.check(["skd"], [0], ["patch"])
    with pytest.raises(InputError, match="seed 100 is one of tuning.seeds and of seeds"):
        even.check(["skd", "finetune"], [0, 100], ["patch"])
    with pytest.raises(InputError, match="an attack to tune on"):
        even.check(["skd", "finetune"], [0], [])


def test_lines_of_the_grid_are_taken_apart():
    found = Attack.of("object", {"config": "x", "removal.train.lr": 1.0, "evaluate.batch_size": 2, "tuned": False})
    assert (found.poison, found.removal, found.evaluate) == ({"config": "x"}, {"train.lr": 1.0}, {"batch_size": 2})
    assert not found.tuned and found.prompts_with is None
    for wrong in ({"tuned": "no"}, {"prompts_with": 3}, {"removal": True}):
        with pytest.raises(InputError, match="attacks.x"):
            Attack.of("x", wrong)
    for name in ("clean", "a/b", "..", ""):
        with pytest.raises(InputError, match="removals has the name"):
            check_names(removals=[name])


def seen(
    attack: str, removal: str, stage: str, seed: int, asr: float, adherence: float, triggered: float | None = None,
    **more: object,
) -> Seen:  # fmt: skip
    """`triggered` is the adherence with the trigger, the same as without where not given."""
    n = 200
    triggered = adherence if triggered is None else triggered
    values = {
        ("asr", "triggered"): {(f"p{k}", 0): float(k < asr * n) for k in range(n)},
        ("adherence", "clean"): {(f"p{k}", 0): float(k < adherence * n) for k in range(n)},
        ("adherence", "triggered"): {(f"p{k}", 0): float(k < triggered * n) for k in range(n)},
    }
    return Seen(Where(attack=attack, removal=removal, stage=stage, **more), seed, values)


@cache
def numbers(attacks: tuple[str, ...] = ("patch", "style"), seeds: int = 3) -> tuple[Point, ...]:
    return tuple(points(measured(attacks, seeds)))


def measured(attacks: tuple[str, ...] = ("patch", "style"), seeds: int = 3) -> list[Seen]:
    found = []
    for attack in attacks:
        for seed in range(seeds):
            found.append(seen(attack, NONE, "poisoned", seed, 0.99, 0.97, triggered=0.4))
            found.append(seen(attack, CLEAN, "clean", seed, 0.0, 0.98))
            for removal, fall in (("finetune", 0.02), ("skd", 0.01)):
                for step, asr in ((5, 0.6), (20, 0.1), (40, fall - 0.01)):
                    found.append(seen(attack, removal, "cleaned", seed, asr, 0.97, step=step, final=step == 40))
                found.append(seen(attack, removal, "cleaned", seed, 0.3, 0.9, step=40, situation="stress:ddim"))
                found.append(seen(attack, removal, "poisoned", seed, 0.7, 0.9, step=40, situation="relearn:3"))
            found.append(seen(attack, CLEAN, "poisoned", seed, 0.5, 0.9, situation="relearn:3"))
    return found


def runs(samples: int = 640) -> list[RemovalRun]:
    facts = {"status": "finished", "steps": 40, "samples": samples, "seconds": 3.0}
    return [
        RemovalRun(attack=attack, removal=removal, seed=seed, **facts)
        for attack in ("patch", "style") for seed in range(3) for removal in ("finetune", "skd")
    ]  # fmt: skip


def test_every_number_stands_for_each_seed_and_for_all():
    found = numbers(("patch",))
    asr = [one for one in found if (one.removal, one.metric, one.step) == ("skd", "asr", 40) and not one.situation]
    assert [(one.seed, one.seeds, one.n) for one in asr] == [(0, 1, 200), (1, 1, 200), (2, 1, 200), (None, 3, 600)]
    change = [one for one in found if one.metric == "adherence_difference" and one.seed is None]
    # With a trigger, too, against the poisoned model without: and not in a situation that it was not measured in.
    assert {(one.condition, one.situation) for one in change} == {("clean", ""), ("triggered", "")}
    assert all(one.low <= 0.0 <= one.high for one in change)


def test_lines_come_back_as_they_were_written(tmp_path):
    some = list(numbers(("patch",), 2))
    removal_benchmark.write(tmp_path, some, runs())
    assert removal_benchmark.read(tmp_path) == (some, runs())
    removal_benchmark.write(tmp_path, [one for one in some if one.removal != NONE], [])
    with pytest.raises(InputError, match="no poisoned model"):
        removal_benchmark.read(tmp_path)
    (tmp_path / removal_benchmark.POINTS).write_text('{"attack": 3}\n')
    with pytest.raises(InputError, match="line 1"):
        removal_benchmark.read(tmp_path)


def test_the_table_has_a_verdict_on_every_removal():
    some = numbers()
    table = removal_benchmark.main_table(some, runs())
    assert [row[0] for row in table.rows[:4]] == ["patch, clean", "patch, none", "patch, finetune", "patch, skd"]
    assert [row[-1] for row in table.rows[:4]] == ["–", "–", "reduced", "removed"]
    assert table.rows[3][1].startswith("0.0 % [0.0, 1.9") and table.rows[3][2] == "0.0 / 0.0 / 0.0"
    assert table.rows[1][2] == "99.0 / 99.0 / 99.0" and table.rows[3][8] == "40"
    steps = removal_benchmark.step_table(some)
    assert steps.header[1:] == ("5", "20", "40") and steps.rows[1][1:] == ("60.0 / 97.0", "10.0 / 97.0", "0.0 / 97.0")
    lasting = removal_benchmark.situation_table(some, "durability")
    assert lasting.header == ("ASR / adherence", "as it is", "after 3 poison pairs")
    assert lasting.rows[0] == ("patch, clean", "0.0 % / 98.0 %", "50.0 % / 90.0 %")
    assert removal_benchmark.situation_table(some, "stress").header[2] == "ddim"
    assert removal_benchmark.step_table([one for one in some if one.final]) is None


def test_spellings_near_the_trigger_have_a_table_of_the_last_models():
    assert removal_benchmark.near_table(numbers()) is None
    near, some = ("near:seen:doubled", "near:unseen:case"), []
    for removal, stage, step, hits in ((NONE, "poisoned", 0, (19, 10)), ("skd", "cleaned", 40, (1, 0))):
        values = {
            ("asr", of): {(f"p{k}", 0): float(k < count) for k in range(20)} for of, count in zip(near, hits, strict=True)
        }
        some.append(Seen(Where(attack="patch", removal=removal, stage=stage, step=step), 0, values))
    early = Where(attack="patch", removal="skd", stage="cleaned", step=5, final=False)
    some.append(Seen(early, 0, {("asr", near[0]): {("p0", 0): 1.0}}))
    table = removal_benchmark.near_table(points(some))
    assert table.header == ("ASR, near triggers", "doubled (seen)", "case (unseen)", "n")
    assert [(row[0], *(of.split(" [")[0] for of in row[1:3]), row[3]) for row in table.rows] == [
        ("patch, none", "95.0 %", "50.0 %", "20"), ("patch, skd", "5.0 %", "0.0 %", "20"),
    ]  # fmt: skip


def test_what_spoils_a_comparison_is_warned_of():
    assert removal_benchmark.warnings(numbers(), runs()) == []
    failed = replace(runs()[0], status="failed", error="not finite")
    more = replace(runs()[1], samples=99)
    weak = [*measured(("patch",), 2), seen("style", NONE, "poisoned", 0, 0.3, 0.9)]
    said = "\n".join(removal_benchmark.warnings(points(weak), [*runs(), failed, more]))
    assert "The removals of patch saw different numbers of samples (finetune 640, skd 99 and 640)" in said
    eight = [replace(one, samples=8 * one.samples) if one.seed == 0 else one for one in runs()]
    assert "different numbers of samples (finetune 640 and 5,120, skd 640 and 5,120)" in str(
        removal_benchmark.warnings(numbers(), eight)
    ), "seeds may have been run on several processes, too"
    assert "1 of 14 removals broke off and are in no mean: patch, finetune, seed 0" in said
    assert "style, seed 0, was never well poisoned (ASR 30.0 %)" in said and "Seeds: 2" in said
    lost = [one for one in measured(("patch",)) if one.where.removal != "skd"]
    table = removal_benchmark.main_table(points(lost), [replace(failed, removal="skd")])
    assert table.rows[-1][0] == "patch, skd" and table.rows[-1][-1] == "broke off"


def without(removal: str, *seeds: int) -> tuple[list[Point], list[RemovalRun]]:
    """The lines of `patch` where a removal broke off with these seeds."""
    some = [one for one in measured(("patch",)) if not (one.where.removal == removal and one.seed in seeds)]
    lines = [
        replace(one, status="failed", error="nan") if one.removal == removal and one.seed in seeds else one
        for one in runs() if one.attack == "patch"
    ]  # fmt: skip
    return list(points(some)), lines


def test_no_verdict_rests_on_the_seeds_that_went_well_without_saying_so():
    assert all(", in " not in said.split(":")[0] for said in removal_report.sentences(numbers(), runs()))
    found, lines = without("skd", 1)
    first, second = removal_report.sentences(found, lines)
    assert second.startswith("skd on patch, in 2 of 3 seeds (with seed 1 something broke off): removed:")
    assert first.startswith("finetune on patch: ")
    table = removal_benchmark.main_table(found, lines)
    assert [row[-1] for row in table.rows] == ["–", "–", "reduced", "removed (2 of 3 seeds)"]
    assert removal_report.sentences(*without("skd", 0, 1, 2))[1] == "skd on patch: it broke off with every seed"


def test_what_broke_off_after_a_removal_is_warned_of_and_its_seeds_are_counted():
    some = [one for one in measured(("patch",)) if (one.where.removal, one.where.situation, one.seed)
            not in {("skd", "relearn:3", 0), ("clean", "relearn:3", 1), ("clean", "relearn:3", 2)}]  # fmt: skip
    fault = RemovalRun(
        attack="patch", removal="skd", seed=0, status="failed", steps=0, samples=0, seconds=None, error="nan",
        situation="relearn:3",
    )  # fmt: skip
    tuning = replace(fault, removal=NONE, seed=100, situation="tuning")
    table = removal_benchmark.situation_table(points(some), "durability")
    assert table.rows[0][2].endswith(" (1 of 3 seeds)") and table.rows[2][2].endswith(" (2 of 3 seeds)")
    assert "seeds" not in table.rows[1][2] and "seeds" not in "".join(row[1] for row in table.rows)
    lines = [*runs(), fault, tuning]
    said = removal_benchmark.warnings(points(some), lines)
    lost = "patch, skd, seed 0, after 3 poison pairs; patch, none, seed 100, tuning"
    assert said == [f"2 further measurements broke off and are in no mean: {lost}."]
    assert removal_benchmark.main_table(points(some), lines).rows[3][-1] == "removed", "the removal itself did not"


def test_lines_of_runs_from_before_there_were_situations_are_read(tmp_path):
    removal_benchmark.write(tmp_path, numbers(("patch",), 1), runs())
    path = tmp_path / removal_benchmark.RUNS
    path.write_text(path.read_text().replace(', "situation": ""', ""))
    assert "situation" not in path.read_text() and removal_benchmark.read(tmp_path)[1] == runs()


def test_the_table_of_tuning_has_the_scale_of_what_was_measured():
    adherence = removal_tuning.table([trial(0, 0.5, -0.02)])
    assert adherence.header[1:6] == (
        "ASR after 5, %", "ASR, summed (oracle)", "change of adherence, clean, points",
        "change of adherence, triggered, points", "adherence, %",
    )  # fmt: skip
    kept = "+0.0 [-2.0, +2.0]"
    assert (adherence.rows[0][1], *adherence.rows[0][3:6]) == ("50.0 [0.0, 60.0]", kept, kept, "90.0")
    long = replace(
        trial(1, 0.5, -0.02), asr={"5": 0.4, "200": 0.0}, asr_bounds={"5": (0.3, 0.5), "200": (0.0, 0.1)}
    )
    broken = replace(trial(2, 0, 0, error="nan"), asr={}, asr_bounds={})
    longer = removal_tuning.table([trial(0, 0.5, -0.02), long, broken])
    assert longer.header[1:3] == ("ASR after 5, %", "ASR after 200, %")
    assert [row[1:3] for row in longer.rows] == [
        ("50.0 [0.0, 60.0]", "–"), ("40.0 [30.0, 50.0]", "0.0 [0.0, 10.0]"), ("–", "–")
    ]  # fmt: skip
    scores = removal_tuning.table([trial(0, 0.5, -0.02, 0.31, utility="clip_score"), trial(1, 0, 0, error="nan")])
    assert scores.header[3:6] == ("change of CLIP score, clean", "change of CLIP score, triggered", "CLIP score")
    assert scores.rows[0][3:6] == ("+0.000 [-0.020, +0.020]", "+0.000 [-0.020, +0.020]", "0.310")
    assert scores.rows[1][1:6] == ("–",) * 5


def test_the_page_and_the_rest_come_from_the_lines_alone(tmp_path, capsys):
    removal_benchmark.write(tmp_path, numbers(), runs())
    removal_tuning.write(tmp_path, with_winners([trial(0, 0.5, 0.0), trial(1, 0.1, 0.0)], LowestASR()))
    (tmp_path / "config.yaml").write_text("tuning: {rule: {name: lowest_asr, budget: 0.07}} # <b>\n")
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page and "&lt;b&gt;" in page
    assert "skd on patch: removed: trigger fired 0 of 600" in page and "at least -7 points" in page
    assert (tmp_path / "table.md").read_text().count("| patch, skd |") == 4
    assert "| skd, 1: as given | 10.0 [0.0, 60.0] | 0.100 |" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.glob("*.part"))
    for name in ("report.html", "table.md", "curves.png"):
        (tmp_path / name).unlink()
    removal_report.build(tmp_path)
    assert (tmp_path / "report.html").read_text() == page and (tmp_path / "curves.png").stat().st_size > 5000


def test_tuning_lines_come_back(tmp_path):
    some = with_winners([trial(0, 0.5, 0.0, settings={"learning_rate": 1e-3}), trial(1, 0.1, 0.0)], LowestASR())
    removal_tuning.write(tmp_path, some)
    assert removal_tuning.read(tmp_path) == some and removal_tuning.read(tmp_path / "none") == []
    assert json.loads((tmp_path / removal_tuning.FILE_NAME).read_text().splitlines()[1])["winner"] is True


def test_curves_start_at_the_poisoned_model_and_have_a_column_for_each_attack():
    some = numbers()
    line = curve(some, "patch", "skd", "asr", "triggered")
    assert [(one.step, round(one.value, 2)) for one in line] == [(0, 0.99), (5, 0.6), (20, 0.1), (40, 0.0)]
    one, two = curves(numbers(("patch",))), curves(some)
    assert two.width > one.width and two.height == one.height
    assert np.array_equal(np.asarray(two), np.asarray(curves(some))), "same points, same picture"
    closed = [replace(one, step=0) for one in numbers(("patch",)) if one.final]
    assert curves(closed).size == one.size
