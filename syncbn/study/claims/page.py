"""The page of the claims: one HTML file that needs nothing else, the same as Markdown, plots and tables as files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape as escape_html
from pathlib import Path

import pandas as pd

from syncbn.study.claims import tables
from syncbn.study.claims.plots import draw
from syncbn.study.claims.result import Finding, Versus
from syncbn.study.format import plural
from syncbn.study.report import blocks, plot_style
from syncbn.study.report.blocks import Block, Group, bullets, escape, terms
from syncbn.study.report.plot_style import Plot
from syncbn.training.atomic_write import unlinked
from syncbn.training.console import printable

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
TABLES = {  # of a claim: heading, and what is written instead of a table without rows
    "cases": ("Each case, norm by norm", "No case has a row."),
    "versus": ("Synchronized against per-device statistics", "No case has both."),
    "published": ("The literature's figures", "No published figure was given for this claim."),
}


def write(findings: Sequence[Finding], title: str, question: str, directory: Path, *, name: str = "report") -> Path:
    """Writes ``NAME.html``, ``NAME.md``, ``tables/*.csv`` and ``plots/*.png`` and ``*.svg``, over older ones.

    The same findings give the same bytes. Files that no such page has written are left alone: its plots are those that
    its ``tables/plots.csv`` names.

    Args:
        findings: in the order of the page.
        title: of the page.
        question: what was asked.
        directory: made if it is not there.
        name: of the page; another one than ``report`` where a report of other kind lies in the directory.

    Returns:
        The path of ``NAME.html``, a file that stands alone.
    """
    directory = Path(directory)
    drawn = _write_plots(findings, directory)
    unlinked(directory / "tables").mkdir(exist_ok=True)
    for table, frame in tables.frames(findings, [[plot.name for plot in each] for each in drawn]).items():
        frame = frame.map(lambda cell: printable(cell) if isinstance(cell, str) else cell)
        frame.to_csv(unlinked(directory / "tables" / f"{table}.csv"), index=False, errors="surrogateescape")
    path = directory / f"{name}.html"
    head = [Block(f"# {escape(title)}"), Block(escape(question), "question")]
    blocks.write([*head, *_blocks(findings, drawn, directory)], title, path, ("report.css", "claims.css"))
    return path


def how_to_read(findings: Sequence[Finding]) -> list[str]:
    """The rule in a few sentences, and what a verdict makes of its answers."""
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
    norms = {side: tables.held_against(findings, side) for side in tables.norms(findings)}
    words = " ".join(f"{escape(side)}: {escape(NORMS[side])}." for side in norms if side in NORMS)
    shared = {
        "worse": [(one, line) for one in findings for line in one.worse],
        "better": [(one, line) for one in findings for line in one.better],
    }
    none_shown = _none_shown([case for one in findings for case in one.versus])
    claim = "{}: " if len(findings) > 1 else ""
    return [
        _matrix(findings, norms),
        Block(words, only="markdown"),  # in HTML they are in the heads of the matrix
        Group([Block("## How to read this"), Block(bullets(how_to_read(findings)))]),
        *(_shared(word, told, none_shown) for word, told in shared.items()),
        blocks.problems([f"{claim.format(one.text)}{line}" for one in findings for line in one.problems]),
        *(_claim(one, plots, directory) for one, plots in zip(findings, drawn, strict=True)),
        Group([Block("## Runs and versions", "part"), *blocks.table(tables.runs(findings)), blocks.computed()]),
    ]


def _matrix(findings: Sequence[Finding], norms: Mapping[str, str]) -> Block:
    """The verdict of each claim on each norm.

    Args:
        findings: a row each.
        norms: a column each, with what it is compared with.
    """
    heads = ["claim", *(f"{side}, against {other}" for side, other in norms.items()), SHARING]
    cells = [[*(tables.verdict(one, side) for side in norms), tables.sharing(one)] for one in findings]
    rows = [[_link(one), *(escape(words) for words, _ in line)] for one, line in zip(findings, cells, strict=True)]
    lines = [[escape(head) for head in heads], ["---"] * len(heads), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Block(text, finish=partial(_finish_matrix, norms, [tone for line in cells for _, tone in line]))


def _finish_matrix(norms: Mapping[str, str], tones: Sequence[str], html: str) -> str:
    """With what a norm is in the heads, with tones, and with heads beside the cells for a narrow screen."""
    words = {side: f"{NORMS[side]}, " if side in NORMS else "" for side in norms}
    heads = [f"{side} against {other}" for side, other in norms.items()] + [SHARING]
    shown = [
        f"{escape_html(side)} <small>{escape_html(f'{words[side]}against {other}')}</small>"
        for side, other in norms.items()
    ]
    each = iter(["claim", *shown, SHARING])
    html = re.sub(r"<th>.*?</th>", lambda _: f"<th>{next(each)}</th>", html)
    html = re.sub(r"<tr>\n<td>(.*)</td>", r'<tr>\n<th scope="row" role="rowheader">\1</th>', html)
    html = re.sub(r"<td>(.*)</td>", r'<td><span class="telling">\1</span></td>', html)
    beside = (f'data-head="{escape_html(heads[at % len(heads)])}"' for at in range(len(tones)))
    cells = (f'role="cell" class="verdict-cell {tone}" {head}' for tone, head in zip(tones, beside, strict=True))
    html = html.replace("<th>", '<th scope="col" role="columnheader">').replace("<tr>", '<tr role="row">')
    html = html.replace("<thead>", '<thead role="rowgroup">').replace("<tbody>", '<tbody role="rowgroup">')
    return blocks.with_attributes(html, "td", cells).replace("<table>", '<table id="matrix" role="table">')


def _shared(word: str, told: Sequence[tuple[Finding, str]], none_shown: str) -> Group:
    lines = [f"- {_link(one)}: {escape(line)}" for one, line in told]
    heading = f"## Where synchronized statistics do {word} than per-device ones"
    return Group([Block(heading), Block("\n".join(lines) or escape(none_shown))], id=word)


def _claim(one: Finding, plots: Sequence[Plot], directory: Path) -> Group:
    prefix, made = f"{one.study}-", tables.build(one)
    verdicts = [tables.verdict(one, side) for side in one.sides]
    words = zip(one.sides, (words for words, _ in verdicts), strict=True)
    inside: list[Block | Group] = [
        Block(f'<a id="{one.study}"></a>', only="markdown"),
        Block(f"## {one.number}. {escape(one.text)}", "part"),
        Block(f"*The claim:* {escape(one.article)}" if one.article else "", "about"),
        Block(f"*The test:* {escape(one.method)}" if one.method else "", "about"),
        terms(words, "verdicts", tones=[tone for _, tone in verdicts]),
        Group([blocks.figure(plot, directory, prefix=prefix) for plot in plots], "div", "plots"),
    ]
    for name, (heading, instead) in TABLES.items():
        inside += [Block(f"### {heading}"), *blocks.table(made.get(name), prefix=prefix, instead=instead)]
    inside += [Block("### Runs"), Block(escape(_counted(one))), blocks.command(one.command)]
    return Group(inside, id=one.study)


def _link(one: Finding) -> str:
    return f"[{one.number}. {escape(one.text)}](#{one.study})"


def _none_shown(versus: Sequence[Versus]) -> str:
    """Of cases none of which is better, or worse."""
    both = sum(case.n > 0 for case in versus)
    if both == 1:
        return "The one case that has both did not show it."
    return f"None of the {both} cases that have both showed it." if both else NO_BOTH


def _counted(finding: Finding) -> str:
    said = f"{plural(finding.seeds, 'seed')}, {plural(finding.runs, 'run')}, {finding.finished:,} with a result"
    if finding.diverged:
        said += f", of which {finding.diverged:,} diverged and count with the error that they have"
    return f"{said}."


def _write_plots(findings: Sequence[Finding], directory: Path) -> list[list[Plot]]:
    plots = unlinked(directory / "plots")
    plots.mkdir(parents=True, exist_ok=True)
    for name in _plots_before(directory / "tables" / "plots.csv"):
        for kind in ("png", "svg"):
            (plots / f"{name}.{kind}").unlink(missing_ok=True)  # what this page has not must not stay beside it
    drawn: list[list[Plot]] = []
    with plot_style.style():
        for finding in findings:
            names = [f"{finding.study}-{plot.name}-{at}" for at, plot in enumerate(finding.plots, 1)]
            drawn.append([draw(plot, name) for plot, name in zip(finding.plots, names, strict=True)])
            plot_style.save(drawn[-1], plots)
    return drawn


def _plots_before(table: Path) -> set[str]:
    """Names of the plots that an earlier page has written, without any that would lead elsewhere."""
    try:
        names = pd.read_csv(table, dtype=str, usecols=["plot"])["plot"].dropna()
    except (OSError, ValueError):  # there is none, or it is not ours
        return set()
    return {name for name in names if Path(name).name == name}


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Each claim with the verdict of each norm; then sync against local; then what casts doubt."""
    width = max((len(each.text) for each in findings), default=0)
    for each in findings:
        yield f"{each.number} {each.text:{width}}   " + "   ".join(f"{s}: {each.verdicts[s]}" for s in each.sides)
    for each in findings:
        yield from (f"{each.number} {each.text}: {sentence}" for sentence in [*each.worse, *each.better])
    for each in findings:
        yield from (f"! {each.study}: {problem}" for problem in each.problems)
