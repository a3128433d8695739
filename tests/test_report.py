"""The report in a real browser, opened from disk without a network."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from diffalign.recipes import TrainConfig, train
from diffalign.report import write_report
from diffalign.spec import load

CONFIG = Path(__file__).parents[1] / "configs" / "shapes-dpo.yaml"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)


@pytest.fixture
def page_file(overrides: list[str]) -> Path:
    extra = ["train.logging_steps=1", "train.eval_steps=1", "data.holdout=0.2", "evaluate.prompts=shapes:test"]
    return write_report(train(load(TrainConfig, CONFIG, [*overrides, *extra])).folder)


def test_the_report_needs_nothing_but_itself(page_file: Path) -> None:
    html = page_file.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "http://www.w3.org" in html or "https://" not in html
    assert html.count("<figure") == 3
    assert "diffalign train" in html


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_in_a_browser(page_file: Path, tmp_path: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(page_file.as_uri())
        images = page.locator("figure img")
        assert images.count() == 6
        assert all(images.nth(i).evaluate("e => e.complete && e.naturalWidth > 0") for i in range(6))
        assert page.locator(".curves svg").count() >= 4
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.get_by_role("heading", name="Before and after").is_visible()
        page.locator("summary", has_text="Configuration").click()
        assert page.locator("pre", has_text="learning_rate").is_visible()
        assert not wrong
        browser.close()
