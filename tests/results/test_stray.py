"""From the lines of a study of stray poison to its tables and page."""

from __future__ import annotations

import dataclasses
import html
import json

import pytest

from mmbackdoor.results import benchmark, stray
from mmbackdoor.results.frontier import LargestDrift
from mmbackdoor.results.stray import NO_STRAYS, UNFILTERED, Filtered
from mmbackdoor.types import InputError
from tests.results.test_benchmark import lines, trainings


def filters() -> list[Filtered]:
    facts = {"objective": "clip", "pairs": 1000, "strays": 5, "dropped": 50}
    return [
        Filtered(**facts, filter=name, seed=seed, found=found, auroc=auroc)
        for name, counts, auroc in (("dao", (5, 4), 0.99), ("clip_cosine", (0, 0), None))
        for seed, found in enumerate(counts)
    ]


def test_what_each_filter_found_is_counted():
    table = stray.filter_table(filters())
    assert table.rows[0] == ("clip, dao", "90.0 [-37.1, 217.1]", "5 of 5 / 4 of 5", "0.9900", "5.0", "2")
    assert table.rows[1] == ("clip, clip_cosine", "0.0", "0 of 5 / 0 of 5", "–", "5.0", "2")


def test_a_detection_is_read_whether_or_not_the_truth_was_known(tmp_path):
    said = {"samples": 100, "kept": 90, "dropped": 10, "poisoned": 5, "poisoned_dropped": 4, "auroc": 0.9}
    (tmp_path / "known.json").write_text(json.dumps(said))
    (tmp_path / "none.json").write_text(json.dumps({"samples": 100, "dropped": 10, "poisoned": 0}))
    found = stray.filtered(tmp_path / "known.json", "clip", 1, "dao")
    assert (found.found, found.strays, found.auroc, found.seed) == (4, 5, 0.9, 1)
    none = stray.filtered(tmp_path / "none.json", "clip", 1, "dao")
    assert (none.found, none.strays, none.auroc) == (0, 0, None)
    assert stray.filter_table([none]).rows[0][1] == "none"


def test_the_benchmark_lends_its_cleanings_only_where_it_tried_every_rate():
    points, runs = stray.without_strays(lines(), trainings(), "finetune", (1e-4, 1e-3))
    assert [dataclasses.replace(one, cleaner=one.cleaner and "finetune") for one in points] == lines()
    assert {one.cleaner for one in points + runs} == {None, NO_STRAYS} and len(runs) == len(trainings())
    fewer, _ = stray.without_strays(lines(), trainings(), "finetune", (1e-3,))
    assert {one.learning_rate for one in fewer} == {None, 1e-3}
    for cleaner, rates in (("finetune", (1e-3, 3e-3)), ("par", (1e-3,))):
        points, runs = stray.without_strays(lines(), trainings(), cleaner, rates)
        assert {one.stage for one in points} == {"clean", "poisoned"} and {one.cleaner for one in runs} == {None}


def test_the_page_has_every_filter_in_the_order_of_the_question(tmp_path):
    points, runs = stray.without_strays(lines(), trainings(), "finetune", (1e-4, 1e-3))
    for name in ("dao", UNFILTERED):
        points += [dataclasses.replace(one, cleaner=name) for one in lines() if one.cleaner]
        runs += [dataclasses.replace(one, cleaner=name) for one in trainings() if one.cleaner]
    stray.write(tmp_path, points, runs, filters())
    assert stray.read_filters(tmp_path) == filters()
    rule = LargestDrift()
    page = stray.build(tmp_path, rule, rule.words).read_text()
    cells = stray.in_order(benchmark.cells(points, runs, rule))
    assert [cell.cleaner for cell in cells] == [NO_STRAYS, UNFILTERED, "dao"] * 2
    shown = [page.index(f"<li>{name} on clip: ASR 99.0") for name in (NO_STRAYS, UNFILTERED, "dao")]
    assert shown == sorted(shown) and "5 stray pairs" in page and rule.words in html.unescape(page)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("**What the filters found**") and table.count("| :-- |") == 7
    # Every cleaning broke off: there is nothing to draw, and the tables say so.
    broken = [dataclasses.replace(one, status="failed") if one.cleaner else one for one in runs]
    stray.write(tmp_path, [one for one in points if not one.cleaner], broken, filters())
    assert "every run broke off" in stray.build(tmp_path, rule, rule.words).read_text()
    (tmp_path / stray.FILTERS).write_text('{"filter": 1}\n')
    with pytest.raises(InputError, match="filters.jsonl.*line 1"):
        stray.build(tmp_path, rule, rule.words)
