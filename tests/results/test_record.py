from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmbackdoor.results import record
from mmbackdoor.results.record import Record
from mmbackdoor.types import InputError

ONE = Record(
    run_id="r1",
    stage="cleaned",
    model={"id": "model", "sha256": "ab"},
    attack="badt2i_pixel",
    defense="skd_cag",
    backdoor={"sha256": "cd"},
    suite={"name": "shapes\u2028\u200b", "sha256": "ef"},
    condition="near:unseen:case",
    metric="asr",
    value=0.0,
    ci_low=0.0,
    ci_high=0.006,
    ci_method="wilson",
    n=600,
    n_prompts=60,
    higher_is_better=False,
    seed=0,
    notes={"warnings": ["few prompts"]},
)
FIELDS = (
    "schema run_id stage model attack defense backdoor suite condition metric value ci_low ci_high ci_method n "
    "n_prompts unit higher_is_better seed notes"
)


def test_a_record_survives_the_file_and_has_the_contract_s_fields(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    record.append(path, [ONE])
    record.append(path, [replace(ONE, metric="adherence", value=1)])
    assert record.read(path) == record.read(tmp_path) == [ONE, replace(ONE, metric="adherence", value=1.0)]
    assert " ".join(json.loads(path.read_text().split("\n")[0])) == FIELDS
    assert ONE.warnings == ["few prompts"]
    assert list(tmp_path.iterdir()) == [path]


def test_merge_replaces_the_answer_to_the_same_question(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    record.append(path, [ONE, replace(ONE, condition="clean")])
    record.merge(path, [replace(ONE, value=0.5, ci_high=0.6)])
    assert [row.value for row in record.read(path)] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": "high"}, "value"),
        ({"value": None}, "value"),
        ({"stage": "washed"}, "stage"),
        ({"schema": 2}, "schema"),
        ({"extra": 1}, "extra"),
        ({"ci_low": 0.5, "ci_high": 0.1}, "above ci_high"),
        ({"model": {"id": "x"}}, "sha256"),
        ({"n": "600"}, "n"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, change: dict, says: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(ONE)) + "\n" + json.dumps(asdict(ONE) | change) + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        record.read(path)
    assert says in str(caught.value) and "results.jsonl" in str(caught.value)


@pytest.mark.parametrize("text", ['{"schema": 1', "[]", "NaN", "\x00", '{"schema": 1}'])
def test_a_torn_or_foreign_line_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match=r"results\.jsonl', line 1: "):
        record.read(tmp_path)


def test_files_that_are_not_there_or_not_text_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        record.read(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        record.read(tmp_path)


def test_what_is_not_a_number_cannot_be_recorded() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="no measured number"):
            replace(ONE, value=bad)
    with pytest.raises(InputError, match="both"):
        replace(ONE, ci_low=None)


def test_an_unwritable_place_is_an_input_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir"):
        record.append(tmp_path / "file" / "results.jsonl", [ONE])
    (tmp_path / "kept.jsonl").write_text("{broken\n")
    with pytest.raises(InputError):
        record.append(tmp_path / "kept.jsonl", [ONE])
    assert (tmp_path / "kept.jsonl").read_text() == "{broken\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept.jsonl"]
