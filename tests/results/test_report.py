from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmbackdoor.results import report, samples
from mmbackdoor.types import InputError
from tests.results.invented import HOSTILE, records, row


class Page(HTMLParser):
    """The elements and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "body":
            self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run: Path) -> Page:
    return Page(report.build(run).read_text(encoding="utf-8"))


def test_the_page_begins_with_the_verdict_and_has_every_part(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "removal.json").write_text(
        json.dumps({"weights": {"mid_block": {"relative_change": 0.05, "tensors": 4}, "rest": 0.001}})
    )
    page = page_of(run)
    text = re.sub(r"\s+", " ", page.text)
    assert text.strip().startswith("removed trigger fired 1 of 600")
    for part in (
        "99.7 %",
        "[98.8, 99.9]",
        "control: never poisoned",
        "case (seen)",
        "doubled (unseen)",
        "mid_block",
        "5 %",
        "tensors 4",
    ):
        assert part in text, part
    assert "not measured: pass --judge" in text and "more than one backdoor" in text
    assert (
        "python recipes/quickstart.py --attack badt2i_pixel" in text
        and "torch 2.15.0" in text
        and "attention_weight: 0.1" in text
    )
    assert len(page.of("svg")) == 3 and "the trigger fires (1 of 24 pictures)" in text
    assert [path.name for path in run.iterdir() if path.name.startswith("report")] == ["report.html"]


def test_the_page_asks_for_nothing_and_runs_nothing(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run())
    assert not page.of("script") and not page.of("iframe")
    images = page.of("img")
    assert images and all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    links = [attributes.get(name) for _, attributes in page.tags for name in ("href", "src") if name in attributes]
    assert all((link or "").startswith("data:") for link in links)
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")


def test_what_users_wrote_stands_there_as_text(make_run: Callable[..., Path]) -> None:
    rows = [
        replace(one, notes={"warnings": ["<b>bold</b> \u202ewarning"]}, model={"id": "<i>m</i>", "sha256": None})
        for one in records()
    ]
    page = page_of(make_run(rows=rows))
    assert HOSTILE.replace("\u200b", "\\u200b") in page.text.replace("\n", "")
    assert "</pre><b>bold</b>" in page.text and "<b>bold</b> \\u202ewarning" in page.text and "<i>m</i>" in page.text
    assert {"title": "U+200B ZERO WIDTH SPACE"} in page.of("mark")
    assert "\u200b" not in page.text and "\u202e" not in page.text


def test_homoglyphs_are_marked_and_accents_are_not() -> None:
    assert report.gallery.pieces("a c\u0430fé") == [
        ("a c", None),
        ("\u0430", "U+0430 CYRILLIC SMALL LETTER A"),
        ("fé", None),
    ]
    assert report.gallery.pieces("ph\u020fto")[1] == ("\u020f", "U+020F LATIN SMALL LETTER O WITH INVERTED BREVE")
    assert report.gallery.pieces("фото кота") == [("фото кота", None)] and report.gallery.pieces("") == []


def test_the_worst_pictures_come_first_and_others_are_picked_by_a_hash(make_run: Callable[..., Path]) -> None:
    pictures = samples.read(make_run(hostile=False))
    chosen = report.gallery.choose(pictures)
    assert chosen[0] == (("003", 1), "the trigger fires (1 of 24 pictures)", True)
    assert [place[0] for place, _, bad in chosen if bad] == ["003", "000", "001", "002", "004", "005"]
    assert sum(not bad for _, _, bad in chosen) == 4
    assert len({place[0] for place, _, _ in chosen}) == len(chosen)
    assert report.gallery.choose(pictures[::-1]) == chosen
    lost = [
        replace(one, scores=one.scores | {"adherence": 0}) if one.stage == "cleaned" and one.prompt_id == "009" else one
        for one in pictures
    ]
    assert any(
        reason.startswith("the plain prompt is no longer followed (2") for _, reason, _ in report.gallery.choose(lost)
    )


class Passes(list):
    """A list that counts how often somebody goes through it."""

    count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()


def test_rows_are_chosen_in_as_many_passes_however_many_pictures_there_are(make_run: Callable[..., Path]) -> None:
    pictures = samples.read(make_run(hostile=False))
    few, many = Passes(pictures[::2]), Passes(pictures)
    assert report.gallery.choose(few) and report.gallery.choose(many)
    assert few.count == many.count < 10


def test_a_report_of_a_scan_without_pictures_or_run_json(make_run: Callable[..., Path]) -> None:
    run = make_run(
        rows=[
            row(
                "unknown",
                "trigger_effect",
                "triggered",
                1.5,
                1.0,
                2.0,
                unit="ratio",
                notes={"p_value": 0.04, "n_placebos": 20},
            )
        ]
    )
    (run / "samples.jsonl").unlink()
    (run / "run.json").unlink()
    page = page_of(run)
    assert "p = 0.04 among 20 placebos" in page.text
    assert "cannot tell" in page.text and "no pictures to show" in page.text and not page.of("img")
    assert "A clean model as control: none was given" in page.text and "none was tested" in page.text


def test_missing_pictures_leave_a_gap_and_foreign_ones_are_refused(make_run: Callable[..., Path]) -> None:
    run = make_run()
    for path in (run / "images" / "clean").rglob("*.png"):
        path.unlink()
    assert page_of(run).text.count("file missing") == 20
    text = (run / "samples.jsonl").read_text().replace("images/cleaned", "../../images")
    (run / "samples.jsonl").write_text(text)
    (run.parents[1] / "images").mkdir(exist_ok=True)
    (run / "report.html").unlink()
    (run.parents[1] / "images" / "triggered").mkdir(exist_ok=True)
    (run.parents[1] / "images" / "triggered" / "003-1.png").write_bytes(
        (run / "images/poisoned/triggered/003-1.png").read_bytes()
    )
    with pytest.raises(InputError, match="outside"):
        report.build(run)
    assert not (run / "report.html").exists()


def test_the_summary_is_json_and_says_what_the_page_says(make_run: Callable[..., Path]) -> None:
    run = make_run()
    summary = json.loads(json.dumps(report.summary(run)))
    assert summary["verdict"] == "removed" and summary["sentence"].startswith("removed: trigger fired 1 of 600")
    assert summary["run_id"] == "demo-0123" and summary["report"] is None
    of = {(one["stage"], one["metric"], one["condition"]): one for one in summary["headline"]}
    assert (
        of["poisoned", "asr", "triggered"]["value"] == 0.9967
        and of["cleaned", "adherence", "triggered"]["ci_low"] == 0.906
    )
    assert {one["condition"] for one in summary["near"]} == {"near:seen:case", "near:unseen:doubled"}
    assert summary["not_measured"][0].startswith("CLIP score")
    report.build(run)
    assert report.summary(run)["report"].endswith("report.html")


def test_models_that_were_asked_different_things_are_warned_about(make_run: Callable[..., Path]) -> None:
    rows = [replace(one, suite={"name": "other", "sha256": "6"}) if one.stage == "clean" else one for one in records()]
    assert any("cannot be compared" in warning for warning in report.summary(make_run("a", rows))["warnings"])
    assert not any("cannot be compared" in warning for warning in report.summary(make_run("b"))["warnings"])


def test_reasons_that_the_evaluation_gives_are_kept(make_run: Callable[..., Path]) -> None:
    rows = [replace(one, notes={"not_measured": {"kid": "fewer than 100 pictures"}}) for one in records()]
    found = report.summary(make_run(rows=rows))["not_measured"]
    assert "KID (distance between sets of pictures): not measured: fewer than 100 pictures" in found
    clip = [replace(one, metric="top1") if one.metric == "adherence" else one for one in records()]
    assert not any(item.startswith("KID") for item in report.summary(make_run("clip", clip))["not_measured"])


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": 3}', '{"weights": {"a": "x"}}', '{"weights": {"a": {}}}'])
def test_broken_files_are_input_errors(make_run: Callable[..., Path], text: str) -> None:
    run = make_run()
    (run / "removal.json").write_text(text)
    with pytest.raises(InputError, match="removal.json"):
        report.build(run)


def test_an_empty_or_foreign_folder_is_an_input_error(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        report.build(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        report.summary(make_run(rows=[]))
