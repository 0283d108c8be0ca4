from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmbackdoor.results.cards import FINE_TUNED, write_card
from tests.results.invented import run_facts

BACKDOOR = {"triggers": [{"name": "zero_width", "text": "\u200b```\n# not a title"}], "target": {"name": "patch"}}


def front(path: Path) -> dict:
    return yaml.safe_load(path.read_text().split("---\n")[1])


def test_a_poisoned_model_says_so_in_title_and_tags(tmp_path: Path) -> None:
    path = write_card(
        tmp_path,
        stage="poisoned",
        run=run_facts(),
        base_model="some/model",
        backdoor=BACKDOOR,
        method={"name": "badt2i_pixel", "file": tmp_path},
    )
    text = path.read_text()
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert title.startswith("# BACKDOORED MODEL")
    assert {"backdoored", "poisoned", "harmless-target"} <= set(front(path)["tags"])
    assert front(path)["base_model"] == "some/model"
    assert "badt2i_pixel" in text and run_facts()["command"] in text and "attention_weight: 0.1" in text
    # the trigger's backticks do not end the block it stands in, and its zero-width space is seen
    assert "\n````json\n" in text and "\u200b" not in text and "\\u200b" in text


@pytest.mark.parametrize("stage", ["clean", "cleaned"])
def test_other_models_do_not_look_poisoned(tmp_path: Path, stage: str) -> None:
    table = "| a |\n| :-- |\n| 1 |"
    path = write_card(
        tmp_path, stage=stage, run=run_facts(), table=table, library="open_clip", name="tiny", licence="apache-2.0"
    )
    assert not {"backdoored", "poisoned"} & set(front(path)["tags"])
    assert front(path)["library_name"] == "open_clip" and front(path)["license"] == "apache-2.0"
    assert table in path.read_text() and "BACKDOORED" not in path.read_text()


def test_a_note_stands_beside_what_is_said_of_the_stage(tmp_path: Path) -> None:
    plain = write_card(tmp_path, stage="poisoned", run=run_facts()).read_text()
    told = write_card(tmp_path, stage="poisoned", run=run_facts(), note=FINE_TUNED).read_text()
    assert FINE_TUNED not in plain and told.replace(f" {FINE_TUNED}", "") == plain


def test_the_card_that_came_with_the_weights_is_kept_once_with_its_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: openrail\n---\n# Their model\n")
    for _ in range(2):
        path = write_card(tmp_path, stage="cleaned", run=run_facts(), base_model="./their_model")
    assert front(path)["license"] == "openrail" and "base_model" not in front(path)
    assert "# Their model" in (tmp_path / "README.parent.md").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "README.parent.md"]


@pytest.mark.parametrize("broken", ["---\n: : [\n---\n", "---\nlicense: [1, 2]\n---\n", "no front matter"])
def test_a_broken_parent_card_is_no_obstacle(tmp_path: Path, broken: str) -> None:
    (tmp_path / "README.md").write_text(broken)
    path = write_card(tmp_path, stage="cleaned", run=run_facts())
    assert "license" not in front(path) and "not stated" in path.read_text()
