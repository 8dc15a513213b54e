"""Writes the page on claims: a self-contained HTML file, the same as Markdown, and files of plots and tables."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape as escape_html
from itertools import cycle
from pathlib import Path

import pandas as pd

from syncbn.study.claims import tables
from syncbn.study.claims.plots import draw
from syncbn.study.claims.result import Finding, Versus
from syncbn.study.format import plural
from syncbn.study.report import blocks, plot_style
from syncbn.study.report.blocks import Block, Group, bullets, escape, terms
from syncbn.study.report.plot_style import Plot
from syncbn.study.report.write import write_frames
from syncbn.training.atomic_write import unlinked

NORMS = {
    "none": "no norm",
    "local": "per-device statistics",
    "local_mean": "per-device statistics, running ones averaged",
    "sync": "synchronized statistics",
    "group_norm": "group norm",
    "ghost": "statistics of parts of a device's batch",
    "torch_sync": "torch's synchronized statistics",
}
NO_BOTH = "No case has both synchronized and per-device statistics."
SHARING = "sync against local"  # head of a column
TABLES = {  # tables of a claim: the heading, and the text that replaces a table without rows
    "cases": ("Each case, norm by norm", "No case has a row."),
    "versus": ("Synchronized against per-device statistics", "No case has both."),
    "published": ("The literature's figures", "No published figure was given for this claim."),
}


def write(findings: Sequence[Finding], title: str, question: str, directory: Path, *, name: str = "report") -> Path:
    """Writes ``NAME.html``, ``NAME.md``, ``tables/*.csv``, ``plots/*.png`` and ``plots/*.svg``; replaces older ones.

    Equal findings produce identical files. Plots of an earlier page, as listed in its ``tables/plots.csv``, are
    removed. The directory is created if it does not exist; other files in it stay. Choose another ``name`` than
    ``report`` if it contains a report of another kind.

    Returns:
        The path of ``NAME.html``, which is self-contained.
    """
    drawn = _write_plots(findings, directory)
    write_frames(tables.frames(findings, [[plot.name for plot in each] for each in drawn]), directory / "tables")
    path = directory / f"{name}.html"
    head = [Block(f"# {escape(title)}"), Block(escape(question), "question")]
    blocks.write([*head, *_blocks(findings, drawn, directory)], title, path, ("report.css", "claims.css"))
    return path


def how_to_read(findings: Sequence[Finding]) -> list[str]:
    """Sentences that explain the rule and how answers become a verdict."""
    levels = " or ".join(f"{alpha:g}" for alpha in sorted({one.alpha for one in findings}))
    return [
        "Each norm is asked, in each case of a claim, whether it does better than the side it is held against by what"
        " the rule needs; docs/claims.md has the rules, which were written down before the runs, and what was changed"
        " after.",
        "Yes: it is shown to be better by more than that; no: it is shown not to be; open: these seeds show neither."
        f" Shown is what a one-sided paired t test over seeds says at the level {levels or '0.01'}, corrected for all"
        " cases and norms of the claim (Holm 1979).",
        "A claim holds if the answer is yes in all cases, holds only in the cases with a yes, does not hold if every"
        " case has a no, and is not decided else, which is too few seeds to tell and no sign of no effect. Intervals"
        " are 95 %, by Student's t, each for itself.",
        "A verdict is on normalizing in this way at all, against the side named. Whether it pays to share statistics is"
        " told by sync against local.",
        "There, better and worse are what a two-sided paired t test shows at the same level; no difference is what two"
        " one-sided ones show to be less than needed, either way (p, same); each is corrected for all cases. Where both"
        f" are shown it is better, or worse, by {tables.SMALL}, which the first table leaves out.",
    ]


def _blocks(findings: Sequence[Finding], drawn: Sequence[Sequence[Plot]], directory: Path) -> list[Block | Group]:
    norms = {side: tables.compared_sides(findings, side) for side in tables.norms(findings)}
    words = " ".join(f"{escape(side)}: {escape(NORMS[side])}." for side in norms if side in NORMS)
    none_shown = _text_if_none([case for one in findings for case in one.versus])
    claim = "{}: " if len(findings) > 1 else ""
    return [
        _matrix(findings, norms),
        Block(words, only="markdown"),  # the HTML has them in the heads of the matrix
        Group([Block("## How to read this"), Block(bullets(how_to_read(findings)))]),
        _sharing_section("worse", [(one, line) for one in findings for line in one.worse], none_shown),
        _sharing_section("better", [(one, line) for one in findings for line in one.better], none_shown),
        blocks.problems([f"{claim.format(one.text)}{line}" for one in findings for line in one.problems]),
        *(_claim_section(one, plots, directory) for one, plots in zip(findings, drawn, strict=True)),
        Group([Block("## Runs and versions", "part"), *blocks.table(tables.runs(findings)), blocks.computed()]),
    ]


def _matrix(findings: Sequence[Finding], norms: Mapping[str, str]) -> Block:
    """The matrix of verdicts: a row for each claim, a column for each norm. ``norms`` has the compared sides."""
    heads = ["claim", *(f"{side}, against {other}" for side, other in norms.items()), SHARING]
    cells = [[*(tables.worded_verdict(one, side) for side in norms), tables.sharing(one)] for one in findings]
    rows = [[_link(one), *(escape(words) for words, _ in line)] for one, line in zip(findings, cells, strict=True)]
    lines = [[escape(head) for head in heads], ["---"] * len(heads), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Block(text, finish=partial(_finish_matrix, norms, [tone for line in cells for _, tone in line]))


def _finish_matrix(norms: Mapping[str, str], tones: Sequence[str], html: str) -> str:
    """Adds descriptions of norms to the heads, tones to the cells, and the head of each cell for narrow screens."""
    heads = [f"{side} against {other}" for side, other in norms.items()] + [SHARING]
    small = [", ".join(filter(None, [NORMS.get(side), f"against {other}"])) for side, other in norms.items()]
    shown = (f"{escape_html(side)} <small>{escape_html(text)}</small>" for side, text in zip(norms, small, strict=True))
    each = iter(["claim", *shown, SHARING])
    html = re.sub(r"<th>.*?</th>", lambda _: f"<th>{next(each)}</th>", html)
    html = re.sub(r"<tr>\n<td>(.*)</td>", r'<tr>\n<th scope="row" role="rowheader">\1</th>', html)
    html = re.sub(r"<td>(.*)</td>", r'<td><span class="telling">\1</span></td>', html)
    cells = (
        f'role="cell" class="verdict-cell {tone}" data-head="{escape_html(head)}"'
        for tone, head in zip(tones, cycle(heads), strict=False)
    )
    html = html.replace("<th>", '<th scope="col" role="columnheader">').replace("<tr>", '<tr role="row">')
    html = html.replace("<thead>", '<thead role="rowgroup">').replace("<tbody>", '<tbody role="rowgroup">')
    return blocks.with_attributes(html, "td", cells).replace("<table>", '<table id="matrix" role="table">')


def _sharing_section(word: str, told: Sequence[tuple[Finding, str]], none_shown: str) -> Group:
    lines = [f"- {_link(one)}: {escape(line)}" for one, line in told]
    heading = f"## Where synchronized statistics do {word} than per-device ones"
    return Group([Block(heading), Block("\n".join(lines) or escape(none_shown))], id=word)


def _claim_section(one: Finding, plots: Sequence[Plot], directory: Path) -> Group:
    prefix, made = f"{one.study}-", tables.build(one)
    words, tones = zip(*(tables.worded_verdict(one, side) for side in one.sides), strict=True)
    inside: list[Block | Group] = [
        Block(f'<a id="{one.study}"></a>', only="markdown"),
        Block(f"## {one.number}. {escape(one.text)}", "part"),
        Block(f"*The claim:* {escape(one.article)}" if one.article else "", "about"),
        Block(f"*The test:* {escape(one.method)}" if one.method else "", "about"),
        terms(zip(one.sides, words, strict=True), "verdicts", tones=tones),
        Group([blocks.figure(plot, directory, prefix=prefix) for plot in plots], "div", "plots"),
    ]
    for name, (heading, instead) in TABLES.items():
        inside += [Block(f"### {heading}"), *blocks.table(made.get(name), prefix=prefix, instead=instead)]
    inside += [Block("### Runs"), Block(escape(_run_counts(one))), blocks.command(one.command)]
    return Group(inside, id=one.study)


def _link(one: Finding) -> str:
    return f"[{one.number}. {escape(one.text)}](#{one.study})"


def _text_if_none(versus: Sequence[Versus]) -> str:
    """The text if no case is better, or none is worse."""
    both = sum(case.n > 0 for case in versus)
    if both == 1:
        return "The one case that has both did not show it."
    return f"None of the {both} cases that have both showed it." if both else NO_BOTH


def _run_counts(finding: Finding) -> str:
    said = f"{plural(finding.seeds, 'seed')}, {plural(finding.runs, 'run')}, {finding.finished:,} with a result"
    if finding.diverged:
        said += f", of which {finding.diverged:,} diverged and count with the error that they have"
    return f"{said}."


def _write_plots(findings: Sequence[Finding], directory: Path) -> list[list[Plot]]:
    plots = unlinked(directory / "plots")
    plots.mkdir(parents=True, exist_ok=True)
    for name in _plots_of_earlier_page(directory / "tables" / "plots.csv"):
        for kind in ("png", "svg"):
            (plots / f"{name}.{kind}").unlink(missing_ok=True)  # otherwise plots that the new page lacks would stay
    drawn: list[list[Plot]] = []
    with plot_style.style():
        for finding in findings:
            names = [f"{finding.study}-{plot.name}-{at}" for at, plot in enumerate(finding.plots, 1)]
            drawn.append([draw(plot, name) for plot, name in zip(finding.plots, names, strict=True)])
            plot_style.save(drawn[-1], plots)
    return drawn


def _plots_of_earlier_page(table: Path) -> set[str]:
    """Names of an earlier page's plots, without names that would lead out of the directory."""
    try:
        names = pd.read_csv(table, dtype=str, usecols=["plot"])["plot"].dropna()
    except (OSError, ValueError):  # the file is missing, or another program wrote it
        return set()
    return {name for name in names if Path(name).name == name}


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Terminal output: the verdicts of each claim, then sync against local, then the problems."""
    width = max((len(each.text) for each in findings), default=0)
    for each in findings:
        yield f"{each.number} {each.text:{width}}   " + "   ".join(f"{s}: {each.verdicts[s]}" for s in each.sides)
    for each in findings:
        yield from (f"{each.number} {each.text}: {sentence}" for sentence in [*each.worse, *each.better])
    for each in findings:
        yield from (f"! {each.study}: {problem}" for problem in each.problems)
