"""``comparison_page``: the sections of a comparison's page, in order. The first screen has the answer."""

from collections.abc import Sequence
from functools import partial
from html import escape as escape_html
from pathlib import Path

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer, blocks, tables
from syncbn.study.report.blocks import Block, Group, bullets, escape, terms
from syncbn.study.report.plots.plot_style import Plot
from syncbn.study.report.symbol_matrix import Cell, Matrix, legend, symbol_matrix
from syncbn.training.console import printable


def comparison_page(c: Comparison, drawn: Sequence[Plot], directory: Path, place: str = "") -> list[Block | Group]:
    """The blocks of a page.

    The files of the plots ``drawn`` must exist in ``directory``. ``place`` is this directory relative to the page: "",
    or "NAME/" on a page of several comparisons.
    """
    part = Part(c, drawn, directory, place)
    heading = Block(f"{'#' * (1 + bool(place))} {escape(c.title)}", "part" if place else "")
    return [heading, Block(escape(c.question), "question"), *part.answer(), part.problems(), *part.details()]


class Part:
    """Builds the blocks of one comparison; arguments as in :func:`comparison_page`."""

    def __init__(self, c: Comparison, drawn: Sequence[Plot], directory: Path, place: str) -> None:
        self._c, self._drawn, self._directory, self._place = c, drawn, directory, place
        self._prefix, self._deeper = place.replace("/", "-"), "#" if place else ""
        self._tables = tables.build(c)

    def answer(self) -> list[Block | Group]:
        """The first screen: a sentence, a figure, a matrix of symbols with its legend, and a line on the cost."""
        matrix = symbol_matrix(self._c)
        shown = [
            Block(matrix_markdown(matrix) if matrix.rows else "", finish=partial(_html, matrix)),
            Block("\n\n".join(map(escape, legend(self._c))), finish=_legend),
            Block(escape(answer.cost(self._c)), "cost"),
        ]
        beside = Group([self._figures("metric"), Group(shown, "div", "matrix")], "div", "first")
        return [Block(f"**{escape(answer.sentence(self._c))}**", "verdict"), beside]

    def problems(self) -> Group:
        """The box with reasons for doubt; empty without any."""
        return blocks.problems(self._c.problems, self._deeper, self._prefix)

    def details(self) -> list[Group]:
        """All else, folded."""
        c, baseline = self._c, printable(self._c.baseline)
        effects = (
            [*self._table("effects"), terms(tables.effects_notes(c), "notes")] if "effects" in self._tables else []
        )
        how = "Runs in one process that simulates several devices, repeated with a process for each device."
        return [
            self._folded(
                f"Differences from {baseline} between runs of one seed, with tests", self._figures("effects"), *effects
            ),
            self._folded("Means of each side", *self._table("means"), *self._note("means", tables.MEANS_NOTE)),
            self._folded("Each seed and each epoch", self._figures("seeds", "curves")),
            self._folded("Cost", self._figures("cost"), *self._table("cost"), *self._note("cost", tables.COST_NOTE)),
            self._folded("Layers", *self._suggestion(), self._figures("layers"), *self._table("layers")),
            self._folded(
                "Expected and published figures",
                *self._table("expected", "No published or expected figure was given for this comparison."),
            ),
            self._folded(
                "One process against several",
                Block(how if "confirmations" in self._tables else "", only="html"),
                *self._table(
                    "confirmations", "No settings ran both in one process and with a process for each device."
                ),
            ),
            self._folded("What was run", self._settings()),
            self._folded(self._runs_title(), *self._table("runs", "No run was found.")),
            self._folded("How to make this page again", blocks.command(c.command), blocks.computed()),
        ]

    def _folded(self, summary: str, *inside: Block | Group) -> Group:
        return Group(inside, "details", summary=summary)

    def _figures(self, *names: str) -> Group:
        shown = [plot for plot in self._drawn if plot.name.startswith(names)]
        figures = [blocks.figure(plot, self._directory, self._place, self._prefix) for plot in shown]
        return Group(figures, "div", "plots")

    def _table(self, name: str, instead: str = "") -> list[Block]:
        return blocks.table(self._tables.get(name), self._place, self._prefix, instead)

    def _note(self, table: str, text: str) -> list[Block]:
        """A note below a table; nothing if there is no table."""
        return [Block(escape(text), "notes")] if table in self._tables else []

    def _suggestion(self) -> list[Block]:
        return [Block(f"**Suggestion:** {escape(self._c.suggestion)}")] if self._c.suggestion else []

    def _settings(self) -> Group:
        facts = {
            "What differs between the sides": self._c.differs,
            "What all runs share": self._c.constant,
            "Runs": tables.counted(self._c),
        }
        lists = [Group([Block(f"{title}:\n\n{bullets(lines)}")], "div") for title, lines in facts.items() if lines]
        return Group(lists, "div", "facts")

    def _runs_title(self) -> str:
        rows = self._tables["runs"].rows if "runs" in self._tables else []
        return f"All {len(rows)} runs, also those in no pair" if rows else "All runs"


def matrix_markdown(matrix: Matrix) -> str:
    """The matrix as a Markdown table."""
    lines = [[label, mean, *(cell.text for cell in cells)] for label, mean, cells in matrix.rows]
    rows = [f"| {' | '.join(escape(cell) or ' ' for cell in line)} |" for line in [matrix.columns, *lines]]
    return "\n".join([rows[0], f"|---|--:|{'---|' * (len(matrix.columns) - 2)}", *rows[1:]])


def _html(matrix: Matrix, _: str) -> str:
    heads = "".join(f'<th scope="col">{escape_html(printable(head))}</th>' for head in matrix.columns)
    rows = "".join(map(_row, matrix.rows))
    many = " many" if len(matrix.columns) > 4 else ""
    table = f'<table class="symbols{many}"><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Differences">\n{table}\n</div>'


def _row(row: tuple[str, str, list[Cell]]) -> str:
    label, mean, cells = row
    head = f'<th scope="row">{escape_html(printable(label))}</th>'
    return f'<tr>{head}<td class="number">{mean}</td>{"".join(map(_cell, cells))}</tr>'


def _cell(cell: Cell) -> str:
    parts = {"symbol": cell.symbol, "difference": cell.difference, "interval": cell.interval}
    spans = " ".join(f'<span class="{name}">{text}</span>' for name, text in parts.items() if text)
    return f'<td class="{cell.tone}">{spans}</td>' if cell.tone else f"<td>{spans}</td>"


def _legend(html: str) -> str:
    return html.replace("<p>", '<p class="notes">')
