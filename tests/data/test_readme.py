from __future__ import annotations

from pathlib import Path

from mmbackdoor.shards.bad import KINDS

README = (Path(__file__).parents[2] / "data" / "README.md").read_text("utf-8")


def test_every_kind_of_problem_is_documented():
    rows = [line for line in README.splitlines() if line.startswith("| `") and line.count("|") == 3]
    assert {f"| `{kind}` | {meaning} |" for kind, meaning in KINDS.items()} <= set(rows)
