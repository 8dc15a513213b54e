"""Writes the page on claims: a self-contained HTML file, the same as Markdown, and files of plots and tables.

Its first screen answers: one or two sentences and a matrix of symbols. Each claim has a section below.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from syncbn.study.claims.report import matrix, sentences, stored, tables
from syncbn.study.claims.report.matrix import Cell, norm_cell, sharing_cell
from syncbn.study.claims.report.plots import draw
from syncbn.study.claims.report.stored import Stored
from syncbn.study.claims.result import Finding
from syncbn.study.format import plural
from syncbn.study.report import blocks
from syncbn.study.report.blocks import Block, Group, bullets, escape, terms
from syncbn.study.report.plots import plot_style
from syncbn.study.report.plots.plot_style import Plot
from syncbn.training.atomic_write import unlinked

NORMS = {
    "none": "no norm",
    "local": "per-device statistics",
    "local_mean": "per-device statistics, running ones averaged",
    "sync": "synchronized statistics",
    "group_norm": "group norm",
    "ghost": "statistics of parts of a device's batch",
    "shuffle": "per-device statistics of shuffled samples",
    "torch_sync": "torch's synchronized statistics",
}
DETAILS = "Details: the test, each case, published figures, runs"
TABLES = {  # tables of a claim: the heading, and the text that replaces a table without rows
    "cases": ("Each case, norm by norm", "No case has a row."),
    "versus": ("Synchronized against per-device statistics", "No case has both."),
    "published": ("Published figures beside ours", "No published figure was given for this claim."),
}


def write(findings: Sequence[Finding], title: str, question: str, directory: Path, *, name: str = "report") -> Path:
    """Writes ``NAME.html``, ``NAME.md``, ``tables/``, ``plots/*.png`` and ``plots/*.svg``; replaces older ones.

    Equal findings produce identical files. :func:`syncbn.study.claims.report.remake.remake` writes them again from
    ``tables/``. Plots of an earlier page, as listed in its ``tables/plots.csv``, are removed. The directory is created
    if it does not exist; other files in it stay. Choose another ``name`` than ``report`` if it contains a report of
    another kind.

    Returns:
        The path of ``NAME.html``, which is self-contained.
    """
    for plot in _plots_of_earlier_page(directory / "tables" / "plots.csv"):
        for kind in ("png", "svg"):
            # Otherwise plots that the new page lacks would stay.
            (unlinked(directory / "plots") / f"{plot}.{kind}").unlink(missing_ok=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in blocks.LIBRARIES)
    stored.write(Stored(title, question, name, libraries, list(findings)), directory / "tables")
    return render(stored.read(directory / "tables"), directory)


def render(page: Stored, directory: Path) -> Path:
    """Writes a page and its plots, whose tables have been read.

    Returns:
        The path of the HTML file.
    """
    drawn = _write_plots(page.findings, directory / "plots")
    path = directory / f"{page.name}.html"
    blocks.write(_blocks(page, drawn, directory), page.title, path, ("report.css", "claims.css"))
    return path


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Terminal output: the summary, the matrix, and what to know before believing it."""
    yield from matrix.summary(findings)
    yield ""
    sides = tables.norms(findings)
    heads = [*sides, matrix.SHARING]
    width = max((len(one.text) for one in findings), default=0) + 2
    yield " ".join([" " * width, *heads]).rstrip()
    for one in findings:
        cells = zip(heads, _cells(one, sides), strict=True)
        yield (
            f"{one.number} {one.text:{width - 1}}"
            + " ".join(f"{cell.symbol:{len(head)}}" for head, cell in cells).rstrip()
        )
    yield matrix.LEGEND
    yield from _in_part(findings, heads)
    yield from (f"! {line}" for line in sentences.doubts(findings))


def how_to_read(findings: Sequence[Finding]) -> list[str]:
    """Sentences that explain the rule and how answers become a verdict."""
    levels = " or ".join(f"{alpha:g}" for alpha in sorted({one.alpha for one in findings}))
    return [
        "The rules were written before the runs. docs/claims.md has them, and what was changed afterwards.",
        "A claim has one or more cases. In each case, the rule asks whether a norm is better than the side it is"
        " compared with, by at least the effect in the column needed.",
        "The answer is yes if this is shown, no if the opposite is shown, and open if neither is. The test is a"
        f" one-sided paired t test over seeds at the level {levels or '0.01'}, corrected for all cases and norms of the"
        " claim (Holm 1979).",
        "A claim holds if all answers are yes, and fails if all are no. It holds in part if some are yes. Otherwise it"
        " is undecided.",
        "These verdicts compare a norm with the side named, which is mostly no norm. Whether sharing statistics pays is"
        " a separate question, answered by sync against local: a two-sided paired t test for better and worse, and two"
        " one-sided tests for no difference (p, same), both at the same level and corrected for all cases.",
        f"If both a difference and its smallness are shown, the table reports the difference with ({tables.SMALL}), and"
        " the first matrix leaves it out.",
        f"Intervals are 95 %, by Student's t, without correction. {sentences.CLIPPED} Numbers have as many decimals as"
        " their interval supports.",
    ]


def _blocks(page: Stored, drawn: Sequence[Sequence[Plot]], directory: Path) -> list[Block | Group]:
    findings = page.findings
    norms = {side: tables.compared_sides(findings, side) for side in tables.norms(findings)}
    answer = " ".join(
        f"**{escape(line)}**" if at == 0 else escape(line) for at, line in enumerate(matrix.summary(findings))
    )
    doubts = sentences.doubts(findings)
    return [
        Block(f"# {escape(page.title)}"),
        Block(answer, "answer"),
        _matrix(findings, list(norms)),
        Block(escape(f"{matrix.LEGEND} {_compared(norms)}"), "legend"),
        Block(escape(page.question), "question"),
        Group([Block("## What to know before believing it"), Block(bullets(doubts))], style="problems", id="problems"),
        Group([Block(bullets(how_to_read(findings)))], "details", summary="How a verdict is made"),
        *(_claim_section(one, plots, directory) for one, plots in zip(findings, drawn, strict=True)),
        Group([Block("## Runs and versions", "part"), *blocks.table(tables.runs(findings)), _computed(page.libraries)]),
    ]


def _compared(norms: Mapping[str, str]) -> str:
    """The norms in words, and what they are compared with: ``local: per-device statistics (against none or sync).``"""
    return " ".join(f"{side}: {NORMS.get(side, side)} (against {other})." for side, other in norms.items())


def _cells(one: Finding, sides: Sequence[str]) -> list[Cell]:
    return [*(norm_cell(one, side) for side in sides), sharing_cell(one)]


def _in_part(findings: Sequence[Finding], heads: Sequence[str]) -> Iterator[str]:
    """Lines for the terminal on cells whose words say more than their symbol does."""
    for one in findings:
        by_words = dict[str, list[str]]()
        for head, cell in zip(heads, _cells(one, heads[:-1]), strict=True):
            if len(cell.words.split()) > 2:
                by_words.setdefault(cell.words, []).append("sharing" if head == matrix.SHARING else head)
        if by_words:
            yield f"{one.number} " + "; ".join(f"{', '.join(sides)}: {words}" for words, sides in by_words.items())


def _matrix(findings: Sequence[Finding], sides: Sequence[str]) -> Block:
    """The matrix of verdicts: a row for each claim, a column for each norm."""
    heads = ["claim", *sides, matrix.SHARING]
    cells = [_cells(one, sides) for one in findings]
    rows = [
        [f"[{one.number}. {escape(one.text)}](#{one.study})", *(f"{cell.symbol} {escape(cell.words)}" for cell in line)]
        for one, line in zip(findings, cells, strict=True)
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [list(map(escape, heads)), ["---"] * len(heads), *rows])
    return Block(text, finish=partial(_finish_matrix, len(sides) + 1, [cell for line in cells for cell in line]))


def _finish_matrix(columns: int, cells: Iterable[Cell], html: str) -> str:
    """Adds roles, which the narrow layout would remove, and symbols and tones as elements of their own."""
    html = re.sub(r"<tr>\n<td>(.*)</td>", r'<tr>\n<th scope="row" role="rowheader">\1</th>', html)
    html = re.sub(
        r"<td>(.) (.*)</td>",
        r'<td><span class="symbol" aria-hidden="true">\1</span> <span class="telling">\2</span></td>',
        html,
    )
    html = html.replace("<th>", '<th scope="col" role="columnheader">').replace("<tr>", '<tr role="row">')
    html = html.replace("<thead>", '<thead role="rowgroup">').replace("<tbody>", '<tbody role="rowgroup">')
    html = blocks.with_attributes(html, "td", (f'role="cell" class="verdict-cell {cell.tone}"' for cell in cells))
    return html.replace("<table>", f'<table id="matrix" role="table" style="--columns: {columns}">')


def _claim_section(one: Finding, plots: Sequence[Plot], directory: Path) -> Group:
    prefix = f"{one.study}-"
    verdict, figure = sentences.verdict_sentence(one, matrix.main_side([one]))
    source = f" Source: {one.source}." if one.source else ""
    sharing = [*one.worse, *one.better]
    undecided = sentences.undecided(one)
    first = [blocks.figure(plot, directory, prefix=prefix) for plot in plots[:1]]
    return Group(
        [
            Block(f'<a id="{one.study}"></a>', only="markdown"),
            Block(f"## {one.number}. {escape(one.text)}", "part"),
            Block(f"*Claim:* {escape(one.article + source)}" if one.article else "", "about"),
            Block(f"**{escape(verdict)}** {escape(figure)}".strip(), "claim-verdict"),
            Block(bullets(sharing), "sharing"),
            Group([*first, Block(bullets(undecided), "undecided")], "div", "plots"),
            Group(_details(one, plots[1:], directory), "details", summary=DETAILS),
        ],
        id=one.study,
    )


def _details(one: Finding, plots: Sequence[Plot], directory: Path) -> list[Block | Group]:
    prefix, made = f"{one.study}-", tables.build(one)
    cells = [norm_cell(one, side) for side in one.sides]
    words = [f"{cell.symbol} {one.verdicts.get(side, cell.words)}" for side, cell in zip(one.sides, cells, strict=True)]
    inside: list[Block | Group] = [
        Block(f"*Test:* {escape(one.method)}" if one.method else "", "about"),
        terms(zip(one.sides, words, strict=True), "verdicts", tones=[cell.tone for cell in cells]),
        Group([blocks.figure(plot, directory, prefix=prefix) for plot in plots], "div", "plots"),
    ]
    for name, (heading, instead) in TABLES.items():
        inside += [Block(f"### {heading}"), *blocks.table(made.get(name), prefix=prefix, instead=instead)]
    left_out = Block(bullets(one.left_out))
    return [*inside, Block("### Runs"), Block(escape(_run_counts(one))), left_out, blocks.command(one.command)]


def _run_counts(finding: Finding) -> str:
    text = f"{plural(finding.seeds, 'seed')}, {plural(finding.runs, 'run')}, {finding.finished:,} with a result"
    if finding.diverged:
        text += f", of which {finding.diverged:,} diverged and count with their error"
    return f"{text}."


def _computed(libraries: str) -> Block:
    return Block(
        escape(f"Computed from the run directories by {libraries}. The files in tables/ have all digits."), "notes"
    )


def _write_plots(findings: Sequence[Finding], directory: Path) -> list[list[Plot]]:
    unlinked(directory).mkdir(parents=True, exist_ok=True)
    drawn: list[list[Plot]] = []
    with plot_style.style():
        for one in findings:
            pairs = zip(one.plots, stored.plot_names(one), strict=True)
            drawn.append([draw(plot, name) for plot, name in pairs])
            plot_style.save(drawn[-1], directory)
    return drawn


def _plots_of_earlier_page(table: Path) -> set[str]:
    """Names of an earlier page's plots, without names that would lead out of the directory."""
    try:
        names = pd.read_csv(table, dtype=str, usecols=["plot"])["plot"].dropna()
    except (OSError, ValueError):  # the file is missing, or another program wrote it
        return set()
    return {name for name in names if Path(name).name == name}
