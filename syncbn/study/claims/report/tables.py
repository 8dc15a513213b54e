"""Tables of findings: rounded text for the page, and all digits for CSV files."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from math import isfinite, nan

import pandas as pd

from syncbn.study.claims.report.sentences import clipped, effect_unit
from syncbn.study.claims.result import CaseLabel, Finding, Published, Row, Versus
from syncbn.study.claims.verdict import MEASURED, NOT_ASKED, with_interval
from syncbn.study.format import MISSING, count, probability, rounded
from syncbn.study.report.tables import Column, Table, table

INTERVAL = "[95\u00a0%]"  # a non-breaking space, for table heads
SMALL = "less than what matters"
_TONES = {"yes": "better", "no": "worse", "better": "better", "worse": "worse"}
_ABOUT = ["study", "number"]
OF_ALL = ["baseline", "sharing", "seeds", "alpha", "runs", "finished", "diverged"]


def norms(findings: Iterable[Finding]) -> list[str]:
    """The norms of all claims, in order."""
    return list(dict.fromkeys(side for finding in findings for side in finding.sides))


def compared_sides(findings: Iterable[Finding], side: str) -> str:
    """The sides with which the verdicts compare a side: "none", "none or local"."""
    others = dict[str, None]()
    for finding in findings:
        if side in finding.sides:
            judged = (row for row in finding.rows if row.side == side and row.says != MEASURED)
            others |= dict.fromkeys(row.against for row in judged) or {finding.baseline: None}
    return " or ".join(others)


def build(finding: Finding) -> dict[str, Table]:
    """The tables of one claim by name, without empty ones."""
    made = {"cases": _cases(finding), "versus": _versus(finding), "published": _published(finding)}
    return {name: table for name, table in made.items() if table.rows}


def runs(findings: Sequence[Finding]) -> Table:
    """The number of runs for each claim, and the total."""
    names = ("seeds", "runs", "finished", "diverged")
    rows = [[f"{one.number}. {one.text}", *(count(getattr(one, name)) for name in names)] for one in findings]
    if len(findings) > 1:
        sums = [sum(getattr(one, name) for one in findings) for name in names[1:]]
        rows.append(["all", MISSING, *map(count, sums)])
    heads = ["claim", "seeds", "runs to be made", "with a result", "of these diverged"]
    return Table("verdicts", heads, [False, True, True, True, True], rows, [""] * len(rows))


def frames(findings: Sequence[Finding], files: Sequence[Sequence[str]]) -> dict[str, pd.DataFrame]:
    """Tables with all digits, by the name of their CSV file. ``files`` has the names of each finding's plots."""
    verdicts = [
        {name: getattr(one, name) for name in [*_ABOUT, "text", *OF_ALL]}
        | {"side": side, "verdict": one.verdicts.get(side, NOT_ASKED)}
        for one in findings
        for side in one.sides
    ]
    points = [
        plot.frame.assign(study=one.study, number=one.number, plot=file)
        for one, names in zip(findings, files, strict=True)
        for plot, file in zip(one.plots, names, strict=True)
    ]
    columns = [*_ABOUT, "plot", "panel", "side", "series", "x", "n", "mean", "low", "high"]
    heads = [*_ABOUT, "text", "side", "verdict", *OF_ALL]
    return {
        "verdicts": pd.DataFrame(verdicts, columns=heads),
        "cases": _frame(findings, "rows", Row),
        "versus": _frame(findings, "versus", Versus),
        "published": _frame(findings, "published", Published),
        "plots": pd.concat([pd.DataFrame(columns=columns), *points])[columns],
    }


def _frame(findings: Sequence[Finding], name: str, kind: type) -> pd.DataFrame:
    rows = [{"study": one.study, "number": one.number, **vars(row)} for one in findings for row in getattr(one, name)]
    return pd.DataFrame(rows, columns=[*_ABOUT, *(field.name for field in fields(kind))])


def _cases(finding: Finding) -> Table:
    columns = [
        Column("case", lambda row: row.when or MISSING, numeric=False),
        Column("norm", lambda row: row.side, numeric=False),
        Column("answer", lambda row: row.says, numeric=False),
        Column(f"better by {INTERVAL}", _effect),
        Column("needed", _needed),
        Column("pairs", lambda row: count(row.n) if row.n >= row.planned else f"{row.n} of {row.planned}"),
        Column(f"norm's mean {INTERVAL}", lambda row: _mean(finding, row, row.value, row.value_low, row.value_high)),
        Column("compared with", lambda row: row.against, numeric=False),
        Column(f"its mean {INTERVAL}", lambda row: _mean(finding, row, row.other, row.other_low, row.other_high)),
        Column("p, yes", lambda row: MISSING if row.says == MEASURED else probability(row.p_yes)),
        Column("p, no", lambda row: MISSING if row.says == MEASURED else probability(row.p_no)),
        Column("measured", _measured, numeric=False),
    ]
    return table("cases", finding.rows, columns, lambda row: _TONES.get(row.says, "open"), "answer")


def _versus(finding: Finding) -> Table:
    columns = [
        Column("case", lambda row: row.when or MISSING, numeric=False),
        Column("sync is", lambda row: f"{row.word} ({SMALL})" if row.is_small else row.word, numeric=False),
        Column(f"sync is better by {INTERVAL}", _effect),
        Column("what matters", _what_matters),
        Column("pairs", lambda row: count(row.n)),
        Column("sync", lambda row: _beside(row, row.value)),
        Column("local", lambda row: _beside(row, row.other)),
        Column("p", lambda row: probability(row.p)),
        Column("p, same", lambda row: probability(row.p_same)),
        Column("measured", _measured, numeric=False),
    ]

    def tone(row: Versus) -> str:
        return "open" if row.is_small else _TONES.get(row.word, "open")  # a small effect has no colour

    return table("versus", finding.versus, columns, tone, "sync is")


def _published(finding: Finding) -> Table:
    columns = [
        Column("what", lambda row: row.what, numeric=False),
        Column("published", lambda row: row.published or MISSING, numeric=False),
        Column("ours", lambda row: row.ours, numeric=False),
        Column("agrees", lambda row: row.agrees or MISSING, numeric=False),
        Column("source", lambda row: row.source, numeric=False),
    ]
    return table("published", finding.published, columns, lambda row: _TONES.get(row.agrees, "open"), "agrees")


def _measured(row: Row | Versus) -> str:
    return f"{row.what} ({row.note})" if row.note else row.what


def _what_matters(row: Versus) -> str:
    if not isfinite(row.needed):
        return MISSING
    return f"{row.needed:g} times" if row.is_ratio else f"±{row.needed:g} {effect_unit(row)}".rstrip()


def _needed(row: Row) -> str:
    most = "" if row.at_most is None else f", and at most {row.at_most:g} {row.unit}".rstrip()
    return f"{row.needed:{'' if row.is_ratio else '+'}g} {effect_unit(row)}".rstrip() + most


def _effect(row: Row | Versus) -> str:
    return with_interval(row.effect, row.low, row.high, effect_unit(row) * isfinite(row.effect), sign=not row.is_ratio)


def _mean(finding: Finding, row: Row, value: float, low: float, high: float) -> str:
    label: CaseLabel | None = finding.labels.get(row.case)
    return with_interval(value, *clipped(low, high, label))


def _beside(row: Versus, value: float) -> str:
    """One of the two means, with the decimals that the interval of their difference supports."""
    return rounded(value, nan, nan) if row.is_ratio else rounded(value, row.low, row.high)
