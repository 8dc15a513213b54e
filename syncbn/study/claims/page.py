"""The page of the claims: one HTML file that needs nothing else, the same as Markdown, plots and tables as files."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from syncbn.study.claims import markdown, tables
from syncbn.study.claims.plots import draw
from syncbn.study.claims.result import Finding, Versus
from syncbn.study.format import plural
from syncbn.study.report import html, plot_style
from syncbn.study.report.plot_style import Plot
from syncbn.training.atomic_write import replacing, unlinked
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
    content = _content(findings, drawn, directory) | {"title": title, "question": question}
    page = html.environment().get_template("claims.html.jinja").render(content)
    for file, text in {f"{name}.html": page, f"{name}.md": markdown.render(content)}.items():
        with replacing(directory / file) as draft:
            draft.write_text(text, encoding="utf-8", errors="surrogateescape")
    return directory / f"{name}.html"


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


def _content(findings: Sequence[Finding], drawn: Sequence[Sequence[Plot]], directory: Path) -> dict[str, Any]:
    """What the template and Markdown get."""
    several = len(findings) > 1
    norms = tables.norms(findings)
    claims = [
        {
            "id": f"{one.study}-",
            "f": one,
            "verdicts": [(side, *tables.verdict(one, side)) for side in one.sides],
            "plots": plots,
            "tables": tables.build(one),
            "svg": partial(html.svg, directory / "plots"),
            "counted": _counted(one),
        }
        for one, plots in zip(findings, drawn, strict=True)
    ]
    return {
        "claims": claims,
        "how": how_to_read(findings),
        "norms": [(side, NORMS.get(side, ""), tables.held_against(findings, side)) for side in norms],
        "matrix": [(one, [*(tables.verdict(one, side) for side in norms), tables.sharing(one)]) for one in findings],
        "shared": [
            ("worse", [(one, line) for one in findings for line in one.worse]),
            ("better", [(one, line) for one in findings for line in one.better]),
        ],
        "none_shown": _none_shown([case for one in findings for case in one.versus]),
        "problems": [(one.text if several else "", line) for one in findings for line in one.problems],
        "overall": {"id": "", "tables": {"verdicts": tables.runs(findings)}},
        "computed": html.computed(),
    }


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
