"""The repository's pages in Markdown: their links, their headings as GitHub names them, and their sentences."""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPO = Path(__file__).resolve().parents[2]
PARSER = MarkdownIt("commonmark").enable("table")
ANCHOR = re.compile(r'<a id="([\w-]+)"></a>')
ABBREVIATIONS = re.compile(r"\b(et al|e\.g|i\.e|vs|cf|no)\.", re.IGNORECASE)
END_OF_SENTENCE = re.compile(r"[.!?]+[)\"”]*(?=\s|$)")
DIRECTIVE = re.compile(
    r"^ *(:{3,}.*|:[\w-]+:.*)$", re.MULTILINE
)  # of MyST: `:::{tab-item} Laptop`, `:link: quickstart`


@cache
def tracked() -> frozenset[Path]:
    """The files that git tracks, and their folders."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, encoding="utf-8", check=True)
    files = [REPO / line for line in listed.stdout.splitlines()]
    return frozenset([*files, *(folder for file in files for folder in file.parents)])


def pages() -> list[Path]:
    """All pages, those of reports included."""
    return sorted(path for path in tracked() if path.suffix == ".md" and path.exists())


@dataclass(frozen=True)
class Link:
    """A link or a picture of a page."""

    text: str
    target: str


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    return tuple(PARSER.parse(DIRECTIVE.sub("", page.read_text(encoding="utf-8"))))


def plain(token: Token, code: str | None = None) -> str:
    """The text of a line as it is read, without emphasis and addresses.

    Args:
        token: an inline token.
        code: a word to write for each piece of code; None: the code itself.
    """
    words = []
    for child in token.children or ():
        if child.type == "text":
            words.append(child.content)
        elif child.type == "code_inline":
            words.append(child.content if code is None else code)
        elif child.type in ("softbreak", "hardbreak"):
            words.append(" ")
        elif child.type == "image":
            words.append(plain(child, code))
    return "".join(words)


def links(page: Path) -> list[Link]:
    """The links and pictures of a page, outside of code."""
    found = []
    for token in tokens(page):
        children = token.children or []
        for at, child in enumerate(children):
            if child.type == "image":
                found.append(Link(child.content, str(child.attrs["src"])))
            elif child.type == "link_open":
                end = next(i for i in range(at, len(children)) if children[i].type == "link_close")
                text = plain(Token("inline", "", 0, children=children[at + 1 : end]))
                found.append(Link(text, str(child.attrs["href"])))
    return found


def broken_links(page: Path) -> list[str]:
    """Texts of a page that were meant to be links and are shown as they are written."""
    texts = [child.content for token in tokens(page) for child in token.children or () if child.type == "text"]
    return [text for text in texts if re.search(r"\]\(|\]\s+\((https?:|[^\s)]*\.md)|\]\[", text)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page: a name for each heading, by GitHub's rule, and those that are written as HTML."""
    found: list[str] = ANCHOR.findall(page.read_text(encoding="utf-8"))
    for before, token in pairwise(tokens(page)):
        if before.type == "heading_open":
            name = re.sub(r"[^\w\- ]", "", plain(token).strip().lower()).replace(" ", "-")
            again = sum(each == name or re.fullmatch(rf"{re.escape(name)}-\d+", each) is not None for each in found)
            found.append(f"{name}-{again}" if again else name)
    return frozenset(found)


def sentences(page: Path) -> list[str]:
    """The sentences of a page: of paragraphs and lists, without headings, tables and code."""
    found, table, heading = [], False, False
    for token in tokens(page):
        table = token.type == "table_open" or (table and token.type != "table_close")
        heading = token.type == "heading_open" or (heading and token.type != "heading_close")
        if token.type == "inline" and not table and not heading:
            text = ABBREVIATIONS.sub(r"\1", plain(token, code="CODE"))
            found += [each.strip() for each in END_OF_SENTENCE.split(text) if each.strip()]
    return found


def prose(page: Path) -> str:
    """All text of a page but its code, headings and tables included."""
    return "\n".join(plain(token, code="CODE") for token in tokens(page) if token.type == "inline")
