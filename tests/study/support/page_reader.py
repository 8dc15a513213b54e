"""Reads a report page back for tests."""

from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

HEADINGS = ("h1", "h2", "h3", "h4")
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """The content of a page: tags with their attributes, text, and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in HEADINGS:
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in HEADINGS:
            self.headings[-1] += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data


def html_page(directory: Path, name: str = "report") -> Page:
    return Page((directory / f"{name}.html").read_text(encoding="utf-8"))


def markdown_page(directory: Path, name: str = "report") -> Page:
    text = (directory / f"{name}.md").read_text(encoding="utf-8")
    return Page(MarkdownIt("commonmark").enable("table").render(text))


def flat(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def cells(shown: Page) -> list[list[list[str]]]:
    return [[[cell.strip() for cell in row] for row in table] for table in shown.tables]
