"""Blocks of Markdown that make up a page, written as a Markdown file and as a self-contained HTML file.

markdown-it-py renders the blocks. ``Block.finish`` adds to the HTML what Markdown cannot express: inline plots, tones,
lists of terms, and scroll boxes for wide tables.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape as escape_html
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markdown_it import MarkdownIt

from syncbn.study.report.plots import plot_style
from syncbn.study.report.plots.plot_style import Plot
from syncbn.study.report.tables import Table
from syncbn.training.atomic_write import replacing
from syncbn.training.console import printable

LIBRARIES = ("syncbn", "scipy", "pandas", "matplotlib")
SHORT = 24  # a cell of at most so many characters stays on one line


@dataclass(frozen=True)
class Block:
    """One or more blocks of Markdown.

    Attributes:
        text: the Markdown; "" for none.
        style: CSS class of the first element.
        only: "markdown" or "html" if the block belongs to only one of the two files; "" for both.
        finish: a function that transforms the block's HTML.
    """

    text: str
    style: str = ""
    only: str = ""
    finish: Callable[[str], str] = str


@dataclass(frozen=True)
class Group:
    """Blocks in one HTML element with a tag, CSS class and id. The Markdown file has it only if it is ``details``.

    A ``details`` element has a ``summary``, the text that is visible while the element is closed.
    """

    blocks: "Sequence[Block | Group]"
    tag: str = "section"
    style: str = ""
    id: str = ""
    summary: str = ""


def write(blocks: Sequence[Block | Group], title: str, path: Path, sheets: Sequence[str] = ("report.css",)) -> None:
    """Writes a page as HTML to ``path``, and as Markdown beside it; replaces an older page.

    ``title`` is that of the HTML document, ``sheets`` are style sheets in ``templates/``.
    """
    environment = Environment(loader=PackageLoader("syncbn.study.report", "templates"), autoescape=True)
    page = environment.get_template("page.html.jinja")
    html = page.render(title=printable(title), sheets=sheets, body=_html(blocks))
    markdown = "\n\n".join(_texts(blocks)) + "\n"
    for file, text in {path: html, path.with_suffix(".md"): markdown}.items():
        with replacing(file) as draft:
            draft.write_text(text, encoding="utf-8", errors="surrogateescape")


def escape(text: str) -> str:
    """Escapes text so that Markdown does not read it as markup, and joins its lines."""
    text = printable(" ".join(text.split()))
    text = re.sub(r"([\\`*\[\]<>|~&$!])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word, Markdown takes it literally
    return re.sub(r"^(\d+)?([-+#=.)])(?= |$|#)", r"\1\\\2", text)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list with one item for each line."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def terms(items: Iterable[tuple[str, str]], style: str, colon: str = ":", tones: Sequence[str] = ()) -> Block:
    """A list of terms and their meanings; in HTML a ``dl`` element.

    ``style`` and ``tones`` are CSS classes of the list and of its items. In Markdown, ``colon`` is after each term.
    """
    text = "\n".join(f"- **{escape(term)}**{colon} {escape(meaning)}" for term, meaning in items)
    return Block(text, style, finish=partial(_terms, colon=colon, tones=tones))


def problems(lines: Sequence[str], deeper: str = "", prefix: str = "") -> Group:
    """The box with reasons for doubt; empty without lines."""
    heading = f"{deeper}## What to know before believing it"
    blocks = [Block(heading), Block(bullets(lines))] if lines else []
    return Group(blocks, style="problems", id=f"{prefix}problems")


def table(shown: Table | None, place: str = "", prefix: str = "", instead: str = "") -> list[Block]:
    """A table with a link to its CSV file, or the text ``instead`` if the table is None, that is, has no rows.

    ``place`` is the directory of the files relative to the page, "" or with a slash at the end. ``prefix`` is that of
    HTML identifiers.
    """
    if shown is None:
        return [Block(instead, "none")]
    rows = [f"| {' | '.join(escape(cell) for cell in line)} |" for line in [shown.columns, *shown.rows]]
    rows.insert(1, f"|{'|'.join('--:' if numeric else '---' for numeric in shown.numeric)}|")
    link = Block(f"[all digits]({place}tables/{shown.name}.csv)", only="markdown")
    return [Block("\n".join(rows), finish=partial(_table, shown, prefix)), link]


def figure(plot: Plot, directory: Path, place: str = "", prefix: str = "") -> Block:
    """A plot with its caption. Without a figure only the caption, which contains the reason.

    The plot's files must exist in ``plots/`` in the directory. ``place`` and ``prefix`` are as in :func:`table`.
    """
    if plot.figure is None:
        return Block(escape(plot.caption), "none")
    title = escape(plot.title)
    text = f"![{title}]({place}plots/{plot.name}.png)\n\n**{title}.** {escape(plot.caption)}"
    return Block(text, finish=partial(_figure, plot, directory, prefix))


def command(text: str) -> Block:
    """A code block with a shell command."""
    return Block("\n".join(f"    {printable(line)}" for line in text.splitlines()))


def computed() -> Block:
    """The line on library versions and on the files with all digits."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return Block(
        escape(
            f"Computed from the run directories by {libraries}."
            " Numbers are rounded here; the files in tables/ have all digits, those in plots/ are the figures."
        ),
        "notes",
    )


def with_attributes(html: str, tag: str, attributes: Iterable[str]) -> str:
    """Adds attributes to each element of a tag, in order; "" adds none."""
    each = iter(attributes)
    return re.sub(rf"<{tag}( [^>]*)?>", lambda _: f"<{tag} {next(each)}>".replace(" >", ">"), html)


def _texts(blocks: Iterable[Block | Group]) -> Iterator[str]:
    for block in blocks:
        if not isinstance(block, Group):
            if block.text and block.only != "html":
                yield block.text
        elif block.tag != "details":
            yield from _texts(block.blocks)
        elif inside := list(_texts(block.blocks)):
            yield f"<details>\n<summary>{escape_html(block.summary)}</summary>"
            # a heading would begin a section, which ends after the element that it is in
            yield from (re.sub(r"^#+ (.*)$", r"**\1**", text, flags=re.MULTILINE) for text in inside)
            yield "</details>"


def _html(blocks: Iterable[Block | Group]) -> str:
    return "\n".join(_element(block) if isinstance(block, Group) else _rendered(block) for block in blocks)


def _element(group: Group) -> str:
    inside = _html(group.blocks)
    if not inside.strip():
        return ""
    names = "".join(f' {name}="{value}"' for name, value in (("id", group.id), ("class", group.style)) if value)
    summary = f"<summary>{escape_html(group.summary)}</summary>\n" if group.summary else ""
    return f"<{group.tag}{names}>\n{summary}{inside}\n</{group.tag}>"


def _rendered(block: Block) -> str:
    if not block.text or block.only == "markdown":
        return ""
    tokens = _MARKDOWN.parse(block.text)
    if block.style:
        tokens[0].attrSet("class", block.style)
    return block.finish(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}).strip())


def _terms(html: str, colon: str, tones: Sequence[str]) -> str:
    html = re.sub(
        rf"<li><strong>(.*?)</strong>{colon} (.*?)</li>", r"<div><dt>\1</dt><dd>\2</dd></div>", html, flags=re.DOTALL
    )
    if tones:
        html = with_attributes(html, "div", (f'class="{tone}"' for tone in tones))
        html = html.replace("<dd>", '<dd class="telling">')
    return re.sub(r"^<ul|ul>$", lambda found: found[0].replace("ul", "dl"), html)


def _table(shown: Table, prefix: str, html: str) -> str:
    heads = ('scope="col" class="number"' if numeric else 'scope="col"' for numeric in shown.numeric)
    cells = (f'class="{_cell_classes(shown, column, cell)}"' for row in shown.rows for column, cell in enumerate(row))
    html = with_attributes(with_attributes(html, "th", heads), "td", cells)
    html = with_attributes(html, "tr", ["", *(f'class="{tone}"' if tone else "" for tone in shown.tones)])
    html = with_attributes(html, "table", [f'id="{prefix}table-{shown.name}"'])
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {shown.name}">\n{html}\n</div>'


def _cell_classes(shown: Table, column: int, cell: str) -> str:
    kind = "number" if shown.numeric[column] else "short" if len(cell) <= SHORT else "long"
    return f"{kind} telling" if shown.columns[column] == shown.telling else kind


def _figure(plot: Plot, directory: Path, prefix: str, html: str) -> str:
    svg = plot_style.inline(directory / "plots" / f"{plot.name}.svg", escape_html(printable(plot.title)), prefix)
    caption = html.partition("</p>")[2].strip().removeprefix("<p>").removesuffix("</p>")
    return f'<figure id="{prefix}plot-{plot.name}">\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>'


def _breakable(_: Any, tokens: Sequence[Any], at: int, *__: Any) -> str:
    """Renders text so that lines can break after the slashes of paths and the commas of settings."""
    return re.sub(r"([/,])(?=\w{3})", r"\1<wbr>", escape_html(tokens[at].content))


def _command(_: Any, tokens: Sequence[Any], at: int, *__: Any) -> str:
    return f'<pre tabindex="0">{escape_html(tokens[at].content)}</pre>\n'


_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
_MARKDOWN.add_render_rule("text", _breakable)
_MARKDOWN.add_render_rule("code_block", _command)
