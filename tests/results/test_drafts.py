"""What says how a folder was made is of a call that ended, whoever was stopped or refused in between."""

from __future__ import annotations

from mmbackdoor.results import drafts


def test_a_call_that_ends_settles_its_text_and_one_that_does_not_leaves_the_old_one(tmp_path):
    path = tmp_path / "settings" / "a.yaml"
    assert drafts.begin({path: "first"}, True) == {path: path} and path.read_text() == "first"
    stopped = drafts.begin({path: "second"}, True)[path]
    assert path.read_text() == "first" and stopped.read_text() == "second" and stopped.suffix == ".yaml"
    assert drafts.begin({path: "second"}, False) == {path: stopped}, "every process reads the same file"
    drafts.settle({path: "second"})
    assert path.read_text() == "second" and [one.name for one in path.parent.iterdir()] == ["a.yaml"]


def test_the_same_text_again_touches_nothing(tmp_path):
    path = tmp_path / "a.yaml"
    drafts.begin({path: "text"}, True)
    before = path.stat().st_mtime_ns
    assert drafts.begin({path: "text"}, True) == {path: path}
    drafts.settle({path: "text"})
    assert path.stat().st_mtime_ns == before


def test_only_the_main_process_writes(tmp_path):
    path = tmp_path / "a.yaml"
    assert drafts.begin({path: "text"}, False) == {path: path} and not list(tmp_path.iterdir())
