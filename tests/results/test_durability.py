"""From the lines of a durability study to its tables, sentences, warnings and page."""

from __future__ import annotations

import re

import pytest

from mmbackdoor.results import durability
from mmbackdoor.results.durability import NEVER, Lasting
from mmbackdoor.types import InputError

# ASR as picked, after clean steps, after 1 and after 25 poison pairs.
RATES = {"cleanclip": (0.02, 0.03, 0.2, 0.9), None: (0.01, 0.01, 0.02, 0.1)}


def line(cleaner: str | None, seed: int, pairs: int | None, asr: float, **more: object) -> Lasting:
    facts = {"stage": "cleaned" if cleaner else "clean", "objective": "clip", "cleaner": cleaner}
    tuned = {} if pairs is None else {"finetune_steps": 100, "finetune_epochs": 8.5}
    numbers = {"asr_n": 400, "n": 400, "accuracy": 0.9 - asr / 10, "accuracy_triggered": 0.5, "sha256": "0" * 64}
    return Lasting(**facts | tuned | numbers | {"seed": seed, "poison_pairs": pairs, "asr": asr} | more)


def lines() -> list[Lasting]:
    return [
        line(cleaner, seed, pairs, asr + seed / 100)
        for cleaner, rates in RATES.items()
        for seed in (0, 1, 2)
        for pairs, asr in zip((None, 0, 1, 25), rates, strict=True)
    ]


def test_lines_come_back_as_they_were_written(tmp_path):
    durability.write(tmp_path, lines())
    assert durability.read(tmp_path) == lines()
    durability.write(tmp_path, lines()[1:4])
    with pytest.raises(InputError, match="no model as it was picked"):
        durability.read(tmp_path)
    (tmp_path / durability.LINES).write_text('{"asr": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        durability.read(tmp_path)


def test_asr_stands_beside_accuracy_in_every_situation():
    table = durability.main_table(lines())
    assert table.header == (
        "model", "ASR, as picked, %", "ASR, 100 clean steps, %", "ASR, 1 poison pair, %", "ASR, 25 poison pairs, %",
        "accuracy, as picked, %", "accuracy, 100 clean steps, %", "accuracy, 1 poison pair, %",
        "accuracy, 25 poison pairs, %", "seeds",
    )  # fmt: skip
    cleaned, never = table.rows
    assert (cleaned[0], never[0]) == ("clip, cleanclip", f"clip, {NEVER}")
    assert cleaned[1] == "3.0 [0.5, 5.5]" and cleaned[4].startswith("91.0 [") and cleaned[8].startswith("80.9 [")
    assert cleaned[-1] == "3"


def test_what_comes_back_is_counted_above_the_model_never_poisoned_seed_by_seed():
    table = durability.beyond_table(lines())
    # Both rise by a point a seed: the differences are the same in each.
    assert table.rows == (("clip, cleanclip", "2.0", "18.0", "80.0"),)
    lacking = [one for one in lines() if (one.model, one.seed, one.poison_pairs) != (NEVER, 2, 25)]
    assert durability.beyond_table(lacking).rows[0][3] == "80.0"
    assert durability.beyond_table([one for one in lines() if one.model == NEVER]) is None


def test_sentences_and_warnings():
    assert durability.sentences(lines()) == [
        "cleanclip on clip: ASR 3.0 % as picked, 4.0 % after 100 clean steps (never poisoned: 2.0 %), 21.0 % after 1 "
        "poison pair (never poisoned: 3.0 %), 91.0 % after 25 poison pairs (never poisoned: 11.0 %)"
    ]
    assert durability.warnings(lines()) == []
    some = [one for one in lines() if one.seed < 2 and (one.model, one.seed, one.poison_pairs) != ("cleanclip", 1, 1)]
    some[0] = line("cleanclip", 0, None, 0.8)
    assert durability.warnings(some) == [
        "cleanclip on clip: fine-tuning for 1 poison pair broke off with seed 1.",
        "cleanclip on clip: in 1 of 2 seeds the pick still had its backdoor (mean ASR 41.5 %), so that what it has "
        "afterwards did not come back.",
        "Seeds: 2. That is too few to say that a difference is more than chance.",
    ]


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    durability.write(tmp_path, lines())
    page = durability.build(tmp_path).read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert all(sentence in page for sentence in durability.sentences(lines()))
    assert "8.5 passes over the pairs" in page and (tmp_path / "durability.png").stat().st_size > 5000
    assert (tmp_path / "table.md").read_text().count("| :-- |") == 2 and not list(tmp_path.glob("*.part"))
