from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmbackdoor.results import record, tables
from mmbackdoor.types import InputError
from tests.results.invented import records, row


def test_the_headline_has_a_row_for_each_stage_with_intervals_in_per_cent() -> None:
    table = tables.headline(records())
    assert table.header == (
        "model",
        "ASR, triggered",
        "adherence, clean",
        "adherence, triggered",
        "restoration, triggered",
        "n",
    )
    assert [line[0] for line in table.rows] == ["clean", "poisoned", "cleaned"]
    assert table.rows[1][1:4] == ("99.7 % [98.8, 99.9]", "94.1 % [91.7, 95.8]", "1.2 % [0.6, 2.5]")
    assert table.rows[1][4:] == ("0.31 [0.29, 0.33]", "600 (60 prompts)")


def test_the_full_table_has_every_number_and_a_dash_where_none_is() -> None:
    rows = [*records(), row("cleaned", "kid", "clean", 0.0123, 0.01, 0.02, unit="distance", n=500, n_prompts=None)]
    table = tables.full(rows)
    assert table.header == ("", "clean", "poisoned", "cleaned", "n")
    assert table.rows[-1] == ("KID, clean", "–", "–", "0.0123 [0.01, 0.02]", "500")
    assert len(table.rows) == 9


def test_a_rare_hit_is_not_shown_as_none() -> None:
    assert tables.cell(row("cleaned", "asr", "triggered", 1 / 6000, 0.0, 0.001)) == "0.02 % [0.0, 0.1]"
    assert tables.cell(row("poisoned", "asr", "triggered", 0.9998, 0.99, 1.0)) == "99.98 % [99.0, 100.0]"
    assert (
        tables.cell(row("cleaned", "adherence_difference", "clean", -0.003, -0.014, 0.007))
        == "-0.3 points [-1.4, +0.7]"
    )
    assert tables.cell(replace(row("cleaned", "asr", "clean", 0.5, 0, 1), ci_low=None, ci_high=None)) == "50.0 %"


def test_a_repeated_evaluation_replaces_the_older_number() -> None:
    table = tables.headline([*records(), row("cleaned", "asr", "triggered", 0.5, 0.4, 0.6)])
    assert table.rows[2][1] == "50.0 % [40.0, 60.0]"


def test_two_cleaned_models_are_two_rows() -> None:
    other = [replace(one, model={"id": "other", "sha256": None}) for one in records() if one.stage == "cleaned"]
    assert [line[0] for line in tables.headline([*records(), *other]).rows] == [
        "clean",
        "poisoned",
        "cleaned: model-cleaned",
        "cleaned: other",
    ]


def test_near_triggers_say_which_were_seen() -> None:
    table = tables.near(records())
    assert table is not None
    assert [line[0] for line in table.rows] == ["case (seen)", "doubled (unseen)"]
    assert tables.near([one for one in records() if not one.condition.startswith("near")]) is None


def test_markdown_and_text_are_tables() -> None:
    table = tables.Table(("a|b", "n"), (("図", "1"), ("long name", "22")))
    assert table.markdown().splitlines() == ["| a\\|b | n |", "| :-- | --: |", "| 図 | 1 |", "| long name | 22 |"]
    assert table.text().splitlines() == ["a|b         n", "---------  --", "図          1", "long name  22"]


def test_compare_shows_every_run_and_says_what_cannot_be_compared(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_run("first")
    second = make_run("second", [replace(one, defense=one.defense and "skd") for one in records()])
    text = tables.compare([first, second])
    assert text.count("poisoned") == 2 and "skd_cag" in text and "skd " in text and "Not comparable" not in text
    assert tables.compare([first, second], "markdown").startswith("| run | model | method |")
    third = make_run("third", [replace(one, suite={"name": "x", "sha256": "y"}, seed=1) for one in records()])
    text = tables.compare([first, second, third])
    assert "different prompts: first, second; third" in text and "different seeds" in text
    with pytest.raises(InputError, match="there is no"):
        tables.compare([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="nothing to compare"):
        tables.compare([])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a/run", "b/run"):
        record.replace(tmp_path / place / "results.jsonl", records())
    text = tables.compare([tmp_path / "a/run", tmp_path / "b/run"])
    assert str(tmp_path / "a/run") in text and str(tmp_path / "b/run") in text
