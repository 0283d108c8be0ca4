"""From a benchmark's lines to its numbers, warnings, page and picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from mmbackdoor.results import benchmark, benchmark_report, benchmark_tables
from mmbackdoor.results.benchmark import Measured, Training
from mmbackdoor.results.frontier import BestUtility, LargestDrift, Point, Sight
from mmbackdoor.results.scatter import Panel, scatter
from mmbackdoor.types import InputError


def measured(objective: str, seed: int, asr: float, accuracy: float, **more: object) -> Measured:
    facts = {"stage": "cleaned", "accuracy_triggered": accuracy / 2, "asr_n": 400, "n": 400, "sha256": "0" * 64}
    seen = {"utility": accuracy, "drift": 1 - asr}
    return Measured(**facts | seen | {"objective": objective, "seed": seed, "asr": asr, "accuracy": accuracy} | more)


def lines() -> list[Measured]:
    found = []
    for objective, floor in (("clip", 0.01), ("clip_ssl", 0.30)):
        for seed in (0, 1):
            found.append(measured(objective, seed, 0.02, 0.9, stage="clean", utility=None, drift=None))
            found.append(measured(objective, seed, 0.99, 0.9 - seed / 50, stage="poisoned", drift=0.0))
            for rate in (1e-4, 1e-3):
                for step, asr in ((10, 0.6), (20, floor + seed / 50 + (0.5 if rate == 1e-4 else 0))):
                    more = {"cleaner": "finetune", "learning_rate": rate, "step": step}
                    found.append(measured(objective, seed, asr, 0.88 - seed / 50, **more))
    return found


def training(**more: object) -> Training:
    facts = {"stage": "poisoned", "objective": "clip", "seed": 0, "pairs": 1000, "batch_size": 100, "steps": 50}
    return Training(**facts | {"status": "finished", "seconds": 3.0} | more)


def trainings() -> list[Training]:
    found = [training(objective=objective, seed=seed) for objective in ("clip", "clip_ssl") for seed in (0, 1)]
    for rate in (1e-4, 1e-3):
        for one in found[:4]:
            found.append(dataclasses.replace(one, stage="cleaned", cleaner="finetune", learning_rate=rate))
    return found


def test_lines_come_back_as_they_were_written(tmp_path):
    benchmark.write(tmp_path, lines(), trainings())
    assert benchmark.read(tmp_path) == (lines(), trainings())
    with (tmp_path / benchmark.POINTS).open("a") as stream:
        stream.write('{"stage": "cleaned", "asr": "half"}\n')
    with pytest.raises(InputError, match=f"line {len(lines()) + 1}"):
        benchmark.read(tmp_path)
    benchmark.write(tmp_path, lines()[2:3], [])
    with pytest.raises(InputError, match="no poisoned model"):
        benchmark.read(tmp_path)


def test_every_cleaner_gets_a_frontier_for_each_seed():
    cells = benchmark.cells(lines(), trainings(), LargestDrift(budget=0.05))
    assert [(cell.objective, cell.cleaner, cell.seeds) for cell in cells] == [
        ("clip", "finetune", (0, 1)), ("clip_ssl", "finetune", (0, 1))
    ]  # fmt: skip
    clip, ssl = cells
    assert [one.start.accuracy for one in clip.frontiers] == [0.9, 0.88]
    assert [(one.runs, one.checkpoints, one.succeeded) for one in clip.frontiers] == [(2, 4, 0.5)] * 2
    assert clip.over(lambda one: one.accuracy_at[0]).mean == pytest.approx(0.87)
    assert ssl.over(lambda one: one.accuracy_at[0]).reached == 0
    assert [one.blind.asr for one in ssl.frontiers] == pytest.approx([0.30, 0.32])
    broken = trainings() + [dataclasses.replace(trainings()[-1], status="failed", objective="clip", seed=0)]
    frontiers = benchmark.cells(lines(), broken, LargestDrift())[0].frontiers
    assert [one.runs for one in frontiers] == [3, 2] and frontiers[0].succeeded == pytest.approx(1 / 3)


def test_picks_beyond_the_budget_are_told_from_those_that_the_rule_asks_for(tmp_path):
    strict, wide = (benchmark.cells(lines(), trainings(), LargestDrift(budget=of)) for of in (0.0, 0.05))
    assert [cell.beyond for cell in wide] == [(), ()] and strict[1].beyond
    columns = [benchmark_tables.selection_table(cells).rows[1][5] for cells in (strict, wide)]
    assert columns == [f"{2 - len(strict[1].beyond)} of 2 seeds", "2 of 2 seeds"]
    benchmark.write(tmp_path, lines(), trainings())
    said = "no checkpoint was within the rule&#39;s budget, and the one that lost least was taken"
    pages = [benchmark_report.build(tmp_path, LargestDrift(budget=of)).read_text() for of in (0.0, 0.05)]
    assert [said in page for page in pages] == [True, False]


def lost(*seeds: int) -> tuple[list[Measured], list[Training]]:
    """Lines in which every cleaning of `clip` broke off with these seeds."""
    runs = [
        dataclasses.replace(one, status="failed") if one.cleaner and one.objective == "clip" and one.seed in seeds else one
        for one in trainings()
    ]
    kept = [one for one in lines() if not (one.cleaner and one.objective == "clip" and one.seed in seeds)]
    return kept, runs


def test_a_seed_with_which_every_run_broke_off_is_no_seed_less(tmp_path):
    points, runs = lost(1)
    clip, ssl = benchmark.cells(points, runs, LargestDrift(budget=0.05))
    assert clip.seeds == ssl.seeds == (0, 1) and clip.lost == (1,) and ssl.lost == ()
    assert [(one.runs, one.checkpoints, one.succeeded) for one in clip.frontiers] == [(2, 4, 0.5), (2, 0, 0)]
    assert clip.over(lambda one: one.succeeded).mean == 0.25 and clip.over(lambda one: one.accuracy_at[0]).reached == 1
    frontier, picked = benchmark_tables.frontier_table([clip]).rows[0], benchmark_tables.selection_table([clip]).rows[0]
    assert "88.0 (1 of 2 seeds)" in frontier and frontier[-3:] == ("4", "4", "2")
    assert all("(1 of 2 seeds)" in value for value in picked[1:5])
    benchmark.write(tmp_path, points, runs)
    page = benchmark_report.build(tmp_path, LargestDrift()).read_text()
    assert "in 1 of 2 seeds: with seed 1 every run broke off" in page


def test_a_cleaner_whose_every_run_broke_off_stays_in_every_table(tmp_path):
    points, runs = lost(0, 1)
    found = benchmark.cells(points, runs, LargestDrift())
    assert [cell.objective for cell in found] == ["clip", "clip_ssl"]
    assert benchmark_tables.selection_table(found).rows[0] == (
        "clip, finetune", "none", "none", "none", "none", "0 of 2 seeds", "none"
    )  # fmt: skip
    benchmark.write(tmp_path, points, runs)
    assert "finetune on clip: every run broke off" in benchmark_report.build(tmp_path, LargestDrift()).read_text()
    nothing = [one for one in points if one.stage != "cleaned"]
    benchmark.write(tmp_path, nothing, [dataclasses.replace(one, status="failed") if one.cleaner else one for one in runs])
    assert benchmark_report.build(tmp_path, LargestDrift()).is_file()


def test_runs_with_more_checkpoints_are_warned_of():
    one = measured("clip", 0, 0.5, 0.8, cleaner="cleanclip", learning_rate=1e-3, step=20)
    said = "\n".join(benchmark.warnings([*lines(), one], trainings()))
    assert "different numbers of checkpoints to pick from (finetune 2, cleanclip 1)" in said


def test_a_poisoning_that_broke_off_is_warned_of_and_no_difference_between_objectives():
    broken = training(objective="clip_ssl", seed=2, status="failed", pairs=None, steps=3)
    assert benchmark.warnings(lines(), [*trainings(), broken])[0] == (
        "The poisoned training of clip_ssl, seed 2, broke off: nothing was cleaned there."
    )
    assert len(benchmark.warnings(lines(), [*trainings(), broken])) == 2


def test_lines_of_a_call_that_was_stopped_are_not_taken_for_a_whole_benchmark():
    benchmark.check_whole("x", lines(), trainings(), {"clip": [], "clip_ssl": ["train.adam_beta2"]}, [0, 1])
    with pytest.raises(InputError, match="'x' has no line of the poisoned model of 'clip' with seed 2"):
        benchmark.check_whole("x", lines(), trainings(), {"clip": []}, [0, 2])
    broken = training(seed=2, status="failed", pairs=None)
    benchmark.check_whole("x", lines(), [*trainings(), broken], {"clip": []}, [0, 2])


def test_a_fair_comparison_is_warned_of_seeds_alone():
    assert benchmark.warnings(lines(), trainings()) == [
        "Seeds: 2. That is too few to say that a difference is more than chance."
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 200, "steps": 25}, "different batch sizes (clip 100, clip_ssl 200)"),
        ({"steps": 80}, "different numbers of epochs (clip 5, clip_ssl 8)"),
        ({"steps": 80}, "different numbers of samples seen (clip 5000, clip_ssl 8000)"),
        ({"pairs": 2000}, "different numbers of pairs (clip 1000, clip_ssl 2000)"),
    ],
)
def test_objectives_that_were_trained_otherwise_are_warned_of(change, said):
    other = [
        dataclasses.replace(one, **change) if (one.objective, one.stage) == ("clip_ssl", "poisoned") else one
        for one in trainings()
    ]
    assert any(said in sentence for sentence in benchmark.warnings(lines(), other))


def test_what_else_spoils_a_comparison_is_warned_of():
    longer = training(stage="cleaned", cleaner="cleanclip", learning_rate=1e-3, steps=99)
    failed = training(stage="cleaned", cleaner="finetune", learning_rate=1e-2, status="failed", pairs=None)
    weak = [dataclasses.replace(one, asr=0.5) if one.stage == "poisoned" else one for one in lines()]
    found = "\n".join(benchmark.warnings([one for one in weak if one.stage != "clean"], [*trainings(), longer, failed]))
    assert "different numbers of samples (finetune 5000, cleanclip 9900)" in found
    assert "different numbers of runs" in found and "1 of 10 cleaning runs broke off" in found
    assert "never well poisoned (ASR 50.0 % at 90.0 % accuracy)" in found
    assert "no clean model as control" in found


def test_a_rate_that_was_never_there_is_warned_of():
    reached = training(stage="cleaned", cleaner="cleanclip", learning_rate=1e-3, peak_rate=1e-3)
    missed = [dataclasses.replace(reached, seed=seed, peak_rate=4e-4) for seed in range(6)]
    assert not any("named after" in sentence for sentence in benchmark.warnings(lines(), [reached]))
    found = "\n".join(benchmark.warnings(lines(), [reached, *missed]))
    assert "(clip, seed 0, cleanclip: 0.0004, not 0.001; clip, seed 1, " in found and "and 2 more)" in found


def test_the_training_table_has_what_was_in_force():
    facts = {"peak_rate": 1e-3, "steps_to_peak": 50, "false_negatives": 0.01}
    some = [training(seed=seed, **facts) for seed in (0, 1)]
    some += [training(stage="cleaned", cleaner="cleanclip", learning_rate=rate, peak_rate=rate, weight_decay=10.0)
             for rate in (1e-4, 1e-3, 3e-3)]  # fmt: skip
    some.append(training(stage="cleaned", cleaner="cleanclip", pairs=None, steps=7, status="failed"))
    table = benchmark_tables.training_table(some)
    assert table.rows == (
        ("clip, poisoned", "1,000", "100", "50", "5", "0.001", "50", "–", "1.00", "2"),
        ("clip, cleanclip", "1,000", "100", "7 .. 50", "5", "0.0001 .. 0.003", "–", "10", "–", "4"),
    )


def test_what_was_picked_is_found_in_the_lines():
    found = benchmark.picked(lines(), LargestDrift(budget=0.05))
    assert [(one.objective, one.seed, one.learning_rate, one.step) for one in found] == [
        (objective, seed, 1e-3, 20) for objective in ("clip", "clip_ssl") for seed in (0, 1)
    ]
    cells = benchmark.cells(lines(), trainings(), LargestDrift(budget=0.05))
    assert [one.asr for one in found] == [one.blind.asr for cell in cells for one in cell.frontiers]


def test_no_table_shows_asr_without_accuracy():
    cells = benchmark.cells(lines(), trainings(), LargestDrift())
    start = benchmark_tables.start_table(lines())
    for table in (start, benchmark_tables.frontier_table(cells), benchmark_tables.selection_table(cells)):
        assert any("ASR" in name for name in table.header) and any("accuracy" in name for name in table.header)
        assert all(len(row) == len(table.header) for row in table.rows)
    assert start.rows[1][:3] == ("clip, poisoned", "99.0", "89.0 [76.3, 101.7]")
    row = benchmark_tables.frontier_table(cells).rows[1]
    assert row[0] == "clip_ssl, finetune" and row[1] == "none" and row[-3:] == ("4", "8", "2")


def test_losses_and_differences_are_paired_by_seed():
    """Accuracies differ by 2 points between seeds, what is lost and by how much cleaners differ does not."""
    more = [
        dataclasses.replace(one, cleaner="cleanclip", accuracy=one.accuracy - 0.03, asr=one.asr + 0.01)
        for one in lines()
        if one.cleaner and one.objective == "clip"
    ]
    cells = benchmark.cells([*lines(), *more], trainings(), LargestDrift(budget=0.05))
    lost = {row[0]: row[1:] for row in benchmark_tables.lost_table(cells).rows}
    assert lost["clip, finetune"] == ("2.0",) * 5 + ("2",)
    assert lost["clip, cleanclip"][0] == "5.0" and lost["clip_ssl, finetune"][0] == "none"
    assert benchmark_tables.against_table(cells).rows == (
        ("clip: finetune − cleanclip", "3.0", "3.0", "-1.0", "2"),
    )
    assert "Cleaners against each other" not in benchmark_tables.tables(lines(), [], cells[:1])


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    benchmark.write(tmp_path, lines(), trainings())
    (tmp_path / "config.yaml").write_text("seeds: [0, 1] # <b>\n")
    path = benchmark_report.build(tmp_path, BestUtility())
    page = path.read_text()
    assert path.name == "report.html" and (tmp_path / "scatter.png").stat().st_size > 5000
    assert (tmp_path / "picks.png").stat().st_size > 5000 and page.count("data:image/png") == 2
    said = (tmp_path / "table.md").read_text()
    assert said.startswith("**Before cleaning**") and said.endswith("more than chance.\n")
    assert said.count("| :-- |") == 5
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert "finetune on clip: ASR 99.0 → " in page and "without looking at the trigger" in page
    assert "the best accuracy on clean pictures kept for selection" in page and "&lt;b&gt;" in page
    assert all(sentence in page for sentence in benchmark.warnings(lines(), trainings()))
    assert not list(tmp_path.glob("*.part"))


def _panel(title: str, points: list[tuple[float, float]]) -> Panel:
    made = [Point(asr, accuracy, Sight("run", 1, 0, 0)) for asr, accuracy in points]
    return Panel(title, [Point(1.0, 0.9, Sight("poisoned", 0, 0, 0))], {"finetune": made}, {"finetune": made[:1]})


def test_the_scatter_shows_every_panel_and_a_red_star():
    one = scatter([_panel("clip", [(0.1, 0.5)])])
    two = scatter([_panel("clip", [(0.1, 0.5)]), _panel("clip_ssl", [(0.1, 0.5), (0.7, 0.8)])])
    four = scatter([_panel(name, [(0.5, 0.5)]) for name in "abcd"])
    assert one.mode == "RGB" and two.width > 1.8 * one.width and four.height > 1.6 * one.height
    pixels = np.asarray(one).astype(int)
    red = (abs(pixels - np.array([214, 39, 40])) < 12).all(-1)
    rows, columns = np.nonzero(red[: int(one.height * 0.8)])
    assert len(rows) > 30 and columns.mean() > one.width * 0.8, "the star is at the right, where ASR is 1"
    assert np.array_equal(pixels, np.asarray(scatter([_panel("clip", [(0.1, 0.5)])]))), "same points, same picture"


def test_a_points_file_is_plain_json_lines(tmp_path):
    benchmark.write(tmp_path, lines(), trainings())
    assert len(Path(tmp_path / "points.jsonl").read_text().splitlines()) == len(lines())
