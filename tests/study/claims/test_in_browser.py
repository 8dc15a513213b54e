"""Tests the page on claims in a browser: its first screen answers at 400 and 1400 pixels, light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.study.report.test_in_browser import BOXES, OVERFLOW, assert_legible, open_whole
from tests.study.support.browser import Browser

SCREEN = 900  # pixels: height of the browser's window
OPEN = "document.querySelectorAll('details').forEach(details => details.open = true)"
# The right edge, the overflow and the height of each cell, without the head of the claims (hidden at 400 pixels).
CELLS = """[...document.querySelectorAll('#matrix td, #matrix tbody th, #matrix th:not(:first-child)')].map(e =>
    [e.getBoundingClientRect().right, e.scrollWidth - e.clientWidth, e.getBoundingClientRect().height])"""
BOTTOM = "document.querySelector('{}').getBoundingClientRect().bottom"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1400, False)])
def test_the_page_can_be_read(browser: Browser, nine: Path, width: int, dark: bool) -> None:
    open_whole(browser, nine / "report.html", width, dark=dark)
    assert_legible(browser)
    cells = browser.evaluate(CELLS)
    assert len(cells) == 5 + 9 * 6
    assert all(right <= width and over <= 0 for right, over, _ in cells)
    # Nothing is lost in closed details, and nothing in open ones is too wide.
    browser.evaluate(OPEN)
    assert browser.evaluate(OVERFLOW) <= 0
    assert_legible(browser)
    drawn = {f"{file.name.split('-')[0]}-plot-{file.stem}" for file in nine.glob("plots/*.svg")}
    assert {name for name, size in browser.evaluate(BOXES.format("figure")) if size > 300} == drawn


@pytest.mark.parametrize("width", [400, 1400])
def test_the_first_screen_has_the_answer_and_all_nine_claims(browser: Browser, published: Path, width: int) -> None:
    open_whole(browser, published / "report.html", width)
    assert_legible(browser)
    last = "#matrix" if width == 400 else ".legend"
    assert 0 < browser.evaluate(BOTTOM.format(".answer")) < browser.evaluate(BOTTOM.format(last)) <= SCREEN
    assert all(right <= width and over <= 0 < height for right, over, height in browser.evaluate(CELLS))


def test_the_keyboard_reaches_each_claim_and_opens_its_details(browser: Browser, published: Path) -> None:
    browser.open(published / "report.html", 1400)
    order = browser.evaluate("[...document.querySelectorAll('a, summary')].map(e => [e.tagName, e.tabIndex])")
    assert order == [["A", 0]] * 9 + [["SUMMARY", 0]] * 10
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0
    browser.evaluate("document.querySelector('#noisy_data summary').focus(); document.activeElement.click()")
    assert browser.evaluate("document.querySelector('#noisy_data details').open")


def test_a_symbol_is_not_read_aloud_and_its_words_are(browser: Browser, published: Path) -> None:
    browser.open(published / "report.html", 400)
    cells = (
        "[...document.querySelectorAll('#matrix td')].map(e => [...e.children].map(c => [c.ariaHidden, c.innerText]))"
    )
    shown = browser.evaluate(cells)
    assert len(shown) == 9 * 4
    assert {(symbol[0], words[0]) for symbol, words in shown} == {("true", None)}
    assert {symbol[1] for symbol, _ in shown} == set("✓◐✗?")
    assert all(0 < len(words[1].split()) <= 6 for _, words in shown)
