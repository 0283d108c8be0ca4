"""The report in a real browser, at desktop and phone width, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mmbackdoor.results import report
from tests.results.chromium import PROGRAM, Chromium
from tests.results.invented import HOSTILE, records

pytestmark = [pytest.mark.browser, pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def page(make_run: Callable[..., Path]) -> Path:
    rows = records()
    rows += [
        replace(one, model={"id": "org/" + "long-name" * 12, "sha256": "d" * 64})
        for one in rows
        if one.stage == "cleaned"
    ]
    rows[0] = replace(rows[0], notes={"warnings": ["w" * 300, "<script>alert(3)</script>"]})
    run = make_run(rows=rows)
    with (run / "samples.jsonl").open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    for line in lines:
        if line["prompt_id"] == "001":
            line["prompt"] = line["text"] = "x" * 600
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "removal.json").write_text(json.dumps({"weights": {"down_blocks." + "x" * 120: 0.1}}))
    return report.build(run)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (320, True)])
def test_it_opens_offline_without_a_complaint_and_fits(browser: Chromium, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= browser.evaluate("window.innerWidth") <= width
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.evaluate("document.images.length") > 30
    # nothing sticks out of the page except what scrolls by itself
    assert (
        browser.evaluate(
            "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll') && "
            "one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)"
            ".map(one => one.outerHTML.slice(0, 80))"
        )
        == []
    )
    light = browser.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(value => value > 128)"
    )
    assert light is not dark


def test_hostile_prompts_are_text(browser: Chromium, page: Path) -> None:
    browser.open(page, 1280)
    shown = browser.evaluate("document.body.innerText")
    assert HOSTILE.replace("\u200b", "\\u200b") in shown and "<script>alert(3)</script>" in shown
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    assert shown.startswith(("removed", "reduced"))


def test_the_browser_would_notice(browser: Chromium, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); alert(1)</script>"
        "<div style='width:2000px'>x</div>"
    )
    browser.open(bad, 390)
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert any("dialog" in complaint for complaint in browser.complaints) and len(browser.complaints) >= 2
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
