"""Tests Markdown blocks: escaped text is not markup, and each file has only the blocks that are for it."""

from pathlib import Path

from syncbn.study.report import blocks
from syncbn.study.report.blocks import Block, Group


def written(*parts: Block | Group, directory: Path) -> tuple[str, str]:
    """The Markdown file, and the content of ``main`` in the HTML file."""
    blocks.write(parts, "A title", directory / "page.html")
    html = (directory / "page.html").read_text(encoding="utf-8")
    return (directory / "page.md").read_text(encoding="utf-8"), html.split("<main>")[1].split("</main>")[0].strip()


def test_html_in_markdown_is_text(tmp_path: Path) -> None:
    _, html = written(Block("a <b>bold</b> run\n\n<script>alert(1);</script>"), directory=tmp_path)
    assert html == "<p>a &lt;b&gt;bold&lt;/b&gt; run</p>\n<p>&lt;script&gt;alert(1);&lt;/<wbr>script&gt;</p>"


def test_blocks_of_one_file_and_empty_groups(tmp_path: Path) -> None:
    parts = [Block("both"), Block("here", only="markdown"), Block("there", "notes", only="html")]
    markdown, html = written(*parts, Group([Block("")], id="nothing"), directory=tmp_path)
    assert markdown == "both\n\nhere\n"
    assert " ".join(html.split()) == '<p>both</p> <p class="notes">there</p>'


def test_a_line_may_break_in_paths_but_the_text_is_the_same(tmp_path: Path) -> None:
    _, html = written(Block(blocks.escape("sweep/one,two_three/<4>")), directory=tmp_path)
    assert html == "<p>sweep/<wbr>one,<wbr>two_three/&lt;4&gt;</p>"
