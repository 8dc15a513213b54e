"""Tests the report in a browser: readable at 400 and 1400 pixels, light and dark; the file loads nothing else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer, tables, write
from tests.study.support import comparisons
from tests.study.support.browser import Browser

OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
# Each text with its font size on the screen. The text of an SVG is scaled with the SVG.
TEXTS = """(() => {
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
    while (walk.nextNode()) {
        const parent = walk.currentNode.parentElement, box = parent.getBoundingClientRect()
        if (!walk.currentNode.data.trim() || !box.width || parent.closest("style")) continue
        const matrix = parent.ownerSVGElement ? parent.getScreenCTM() : {a: 1, b: 0}
        const scale = Math.hypot(matrix.a, matrix.b)
        found.push([walk.currentNode.data.trim(), parseFloat(getComputedStyle(parent).fontSize) * scale])
    }
    return found
})()"""
# Texts that extend beyond their plot, in pixels.
CLIPPED = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
    const plot = svg.getBoundingClientRect()
    return [...svg.querySelectorAll("text")].map(text => {
        const box = text.getBoundingClientRect()
        const sideways = Math.max(plot.left - box.left, box.right - plot.right)
        return [text.textContent, Math.max(sideways, plot.top - box.top, box.bottom - plot.bottom)]
    }).filter(found => found[1] > 1)
})"""
BOXES = "[...document.querySelectorAll('{}')].map(e => [e.id, e.getBoundingClientRect().width])"
CONTRAST = """(() => {
    const level = colour => {
        const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
        return parts.map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0)
    }
    const paper = level(getComputedStyle(document.body).backgroundColor)
    return [...document.querySelectorAll("p, h1, h2, dt, dd, td, th, li, figcaption, summary, svg text")].map(e => {
        const style = getComputedStyle(e), ink = level(e.ownerSVGElement ? style.fill : style.color)
        return [e.textContent, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]
    }).filter(found => found[1] < 4.5)
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


def open_whole(browser: Browser, path: Path, width: int, *, dark: bool = False) -> None:
    """Opens a page. It loads nothing else, and nothing of it is clipped."""
    browser.open(path, width, dark=dark)
    assert browser.said == []
    assert browser.requests == [path.as_uri()]
    assert browser.evaluate(OVERFLOW) <= 0
    assert browser.evaluate(CLIPPED) == []


def assert_legible(browser: Browser) -> None:
    assert browser.evaluate(CONTRAST) == []
    assert [text for text in browser.evaluate(TEXTS) if text[1] < 11] == []


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", comparisons.ALL)
def test_the_page_can_be_read(browser: Browser, written: dict[str, Path], name: str, width: int, dark: bool) -> None:
    path = written[name] / "report.html"
    open_whole(browser, path, width, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert_legible(browser)
    made = comparisons.ALL[name]()
    browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.evaluate(OVERFLOW) <= 0
    there = dict(browser.evaluate(BOXES.format("table")))
    assert set(there) - {""} == {f"table-{table}" for table in tables.build(made)}
    assert all(size > 50 for size in there.values())
    drawn = {f"plot-{file.stem}" for file in path.parent.glob("plots/*.svg")}
    there = dict(browser.evaluate(BOXES.format("figure")))
    assert set(there) == drawn
    assert all(size > 300 for size in there.values())


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Comparison], Path]:
    """Two comparisons, and the page with both."""
    made = {"one": comparisons.rich(), "two": comparisons.nothing_differs()}
    return made, write.write_several("A study", "Does it?", made, tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize("width", [400, 1400])
def test_several_comparisons_on_one_page(
    browser: Browser, several: tuple[dict[str, Comparison], Path], width: int
) -> None:
    made, path = several
    open_whole(browser, path, width)
    names = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(names)) == len(names)  # otherwise plots would show parts of each other
    tables_there = {name for name, _ in browser.evaluate(BOXES.format("table")) if name}
    assert tables_there == {f"{name}-table-{table}" for name, each in made.items() for table in tables.build(each)}
    assert browser.evaluate("document.querySelectorAll('figure svg').length") > 8
    text = browser.evaluate("document.querySelector('.answers').innerText")
    for name, each in made.items():
        assert answer.sentence(each) in text
        assert browser.evaluate(f"!!document.querySelector('.answers a[href=\"#{name}-top\"]')")
        assert (path.parent / name / "report.html").exists()
        assert f"({name}/" in (path.parent / "report.md").read_text(encoding="utf-8")


def test_wide_tables_scroll_inside_their_own_box(browser: Browser, written: dict[str, Path]) -> None:
    browser.open(written["rich"] / "report.html", 400)
    inside, outside = browser.evaluate(
        "(() => { const box = document.querySelector('#table-effects').parentElement;"
        " box.scrollLeft = 10000; return [box.scrollLeft, scrollX] })()"
    )
    assert inside > 100
    assert outside == 0


def test_the_colours_of_plots_follow_the_page(browser: Browser, written: dict[str, Path]) -> None:
    path = written["without axis"] / "report.html"
    inks = []
    for dark in (False, True):
        browser.open(path, 1400, dark=dark)
        inks.append(browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        assert inks[-1] == browser.evaluate("getComputedStyle(document.body).color")
    assert inks[0] != inks[1]


def test_what_would_be_wrong_with_a_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<!doctype html><body style='background: #fff'><div style='width: 3000px'>"
        "<p style='font-size: 8px; color: #ccc'>small</p></div>"
        "<figure><svg viewBox='0 0 100 100' width='100'><text x='90' y='50'>clipped</text></svg></figure>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('said'); undefined_function()</script>",
        encoding="utf-8",
    )
    browser.open(tmp_path / "bad.html", 400)
    assert browser.evaluate(OVERFLOW) > 2000
    assert ["small", 8] in browser.evaluate(TEXTS)
    assert [text for text, _ in browser.evaluate(CLIPPED)] == ["clipped"]
    assert [text for text, _ in browser.evaluate(CONTRAST)] == ["small"]
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert any("said" in line for line in browser.said)
    assert any("undefined_function" in line for line in browser.said)


def test_without_a_browser_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        Browser()
