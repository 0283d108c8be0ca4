"""Removals against each other: paired by picture, on the way and at the end, for each attack and for all together."""

from __future__ import annotations

import pytest

from mmbackdoor.evaluate.removal_comparison import comparisons
from mmbackdoor.evaluate.removal_points import Seen
from mmbackdoor.results import removal_comparison
from mmbackdoor.results.removal_benchmark import Where

N = 100


def seen(removal: str, step: int, asr: range, attack: str = "patch", seed: int = 0, **more: object) -> Seen:
    """A model that fires on the prompts in `asr`; what does not fire follows its prompt, but for every tenth."""
    fired = {(f"p{k}", 0): float(k in asr) for k in range(N)}
    follows = {place: float(not hit and index % 10 > 0) for index, (place, hit) in enumerate(fired.items())}
    values = {("asr", "triggered"): fired, ("adherence", "triggered"): follows}
    where = Where(attack=attack, removal=removal, stage="cleaned", step=step, **{"final": step == 40} | more)
    return Seen(where, seed, values)


def measured(attacks: tuple[str, ...] = ("patch", "style"), seeds: int = 2) -> list[Seen]:
    """`cag` fires on 10 prompts less than `skd` after 5 steps, on 20 less after 10, and as rarely at the end."""
    found = []
    for attack in attacks:
        for seed in range(seeds):
            for removal, less in (("skd", 0), ("cag", 10)):
                found.append(seen(removal, 5, range(90 - less), attack, seed))
                found.append(seen(removal, 10, range(60 - 2 * less), attack, seed))
                found.append(seen(removal, 40, range(0), attack, seed))
                found.append(seen(removal, 40, range(3 * less), attack, seed, situation="benign:9"))
    return found


def one_of(lines, attack, after, metric="asr", situation=""):
    wanted = (attack, after, metric, situation)
    [line] = [line for line in lines if (line.attack, line.after, line.metric, line.situation) == wanted]
    return line


def test_differences_are_those_of_the_pictures():
    lines = comparisons(measured(), {"cag": "skd"})
    for attack, n in ((None, 400), ("patch", 200), ("style", 200)):
        for after, value in (((5,), -0.1), ((10,), -0.2), ((5, 10), -0.15), ((), 0.0)):
            line = one_of(lines, attack, after)
            assert (line.value, line.n, line.n_prompts, line.seeds) == (pytest.approx(value), n, N, 2)
            assert line.low <= line.value <= line.high and (line.high < 0) == (value < 0)
    restored = one_of(lines, "patch", (10,), "adherence")
    assert restored.value == pytest.approx(0.18) and restored.condition == "triggered", "of 20 prompts 2 are never followed"
    assert one_of(lines, "patch", (), situation="benign:9").value == pytest.approx(0.3)
    assert {(line.removal, line.against) for line in lines} == {("cag", "skd")}
    assert one_of(comparisons(measured(), {"skd": "cag"}), None, (5,)).value == pytest.approx(0.1), "the other way round"


def test_means_over_steps_are_no_surer_than_their_pictures():
    some = [one for one in measured(("patch",), 1) if one.where.step < 40 and one.where.removal == "skd"]
    same = comparisons(some + [seen("cag", one.where.step, range(90 if one.where.step == 5 else 60)) for one in some], {"cag": "skd"})
    each, mean = one_of(same, "patch", (5,)), one_of(same, "patch", (5, 10))
    assert each.value == mean.value == 0 and (mean.low, mean.high) == (each.low, each.high) and each.high > 0.005


def test_one_attack_alone_is_all_attacks():
    assert {line.attack for line in comparisons(measured(("patch",)), {"cag": "skd"})} == {"patch"}


def test_pictures_that_one_of_them_lacks_do_not_count():
    some = measured(("patch",))
    del some[0].values["asr", "triggered"]["p0", 0]  # skd after 5 steps with seed 0: it fires there.
    lines = comparisons(some, {"cag": "skd"})
    assert [one_of(lines, "patch", after).n for after in ((5,), (10,), (5, 10))] == [199, 200, 199]
    lost = [one for one in measured(("patch",)) if (one.where.removal, one.seed) != ("cag", 1)]
    line = one_of(comparisons(lost, {"cag": "skd"}), "patch", (5,))
    assert (line.n, line.seeds) == (100, 1), "a seed that broke off with one of them"
    assert comparisons([one for one in measured() if one.where.removal != "cag"], {"cag": "skd"}) == []


def test_a_removal_that_has_ended_stays_as_it_ended():
    some = [one for one in measured(("patch",), 1) if one.where.removal != "cag"]
    some += [seen("cag", 5, range(80)), seen("cag", 7, range(30), final=True)]
    lines = comparisons(some, {"cag": "skd"})
    assert one_of(lines, "patch", (10,)).value == pytest.approx(-0.3), "30 against 60: it is what it was after 7"
    assert one_of(lines, "patch", ()).value == pytest.approx(0.3), "each at its own end"


def test_lines_and_tables(tmp_path):
    lines = comparisons(measured(), {"cag": "skd"})
    removal_comparison.write(tmp_path, lines)
    assert removal_comparison.read(tmp_path) == lines and removal_comparison.read(tmp_path / "none") == []
    ends, steps, situations = removal_comparison.tables(lines).values()
    assert ends.header == (
        "attack, removals", "ASR, mean after 5, 10 steps", "ASR, at the end", "adherence, triggered",
        "adherence, clean", "n",
    )  # fmt: skip
    assert [row[0] for row in ends.rows] == ["all attacks, cag - skd", "patch, cag - skd", "style, cag - skd"]
    assert ends.rows[0][1].startswith("-15.0 points [") and ends.rows[0][4:] == ("–", "400 (100 prompts)")
    assert steps.header[1:] == ("5", "10") and steps.rows[1][2].startswith("-20.0 points [")
    assert situations.header[1:] == ("after 9 benign steps",) and situations.rows[0][1].startswith("+30.0 points [")
    assert removal_comparison.tables([]) == {}
    plain = [line for line in lines if not line.after and not line.situation]
    assert len(removal_comparison.tables(plain)) == 1
