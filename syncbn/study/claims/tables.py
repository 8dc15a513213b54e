"""Tables of findings: rounded text for the page, and all digits for CSV files."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from math import isfinite

import pandas as pd

from syncbn.study.claims.result import Finding, Published, Row, Versus
from syncbn.study.claims.verdict import MEASURED, NOT_ASKED
from syncbn.study.format import MISSING, count, interval, number, probability, scientific, signed
from syncbn.study.report.tables import Column, Table, table

INTERVAL = "[95\u00a0%]"  # a non-breaking space, for table heads
SMALL = "less than what matters"
_TONES = {"yes": "better", "no": "worse", "better": "better", "worse": "worse"}
_ABOUT = ["study", "number"]
_OF_ALL = ["baseline", "sharing", "seeds", "alpha", "runs", "finished", "diverged"]


def worded_verdict(finding: Finding, side: str) -> tuple[str, str]:
    """The verdict on a side in words, and its tone: "better", "partly", "worse", "open" or "unused"."""
    words = finding.verdicts.get(side, NOT_ASKED)
    tones = {"holds only": "partly", "holds": "better", "does not hold": "worse", NOT_ASKED: "unused"}
    return words, next((tone for start, tone in tones.items() if words.startswith(start)), "open")


def sharing(finding: Finding) -> tuple[str, str]:
    """Synchronized compared with per-device statistics in words, and the tone: as in :func:`verdict`, or "even"."""
    words = {part.split()[0] for part in finding.sharing.split("; ") if part.strip()} & {"better", "worse"}
    if len(words) == 2:
        return finding.sharing, "partly"
    if words:
        return finding.sharing, words.pop()
    return finding.sharing or MISSING, {"": "unused", "no difference": "even"}.get(finding.sharing, "open")


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
        {name: getattr(one, name) for name in [*_ABOUT, "text", *_OF_ALL]}
        | {"side": side, "verdict": worded_verdict(one, side)[0]}
        for one in findings
        for side in one.sides
    ]
    points = [
        plot.frame.assign(study=one.study, number=one.number, plot=file)
        for one, names in zip(findings, files, strict=True)
        for plot, file in zip(one.plots, names, strict=True)
    ]
    columns = [*_ABOUT, "plot", "panel", "side", "series", "x", "n", "mean", "low", "high"]
    heads = [*_ABOUT, "text", "side", "verdict", *_OF_ALL]
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
        Column("says", lambda row: row.says, numeric=False),
        Column(f"better by {INTERVAL}", _effect),
        Column("needed", _needed),
        Column("pairs", lambda row: count(row.n) if row.n >= row.planned else f"{row.n} of {row.planned}"),
        Column(f"norm's mean {INTERVAL}", lambda row: _mean(row.value, row.value_low, row.value_high, row.unit)),
        Column("held against", lambda row: row.against, numeric=False),
        Column(f"its mean {INTERVAL}", lambda row: _mean(row.other, row.other_low, row.other_high, row.unit)),
        Column("p, yes", lambda row: MISSING if row.says == MEASURED else probability(row.p_yes)),
        Column("p, no", lambda row: MISSING if row.says == MEASURED else probability(row.p_no)),
        Column("measured", lambda row: row.what, numeric=False),
    ]
    return table("cases", finding.rows, columns, lambda row: _TONES.get(row.says, "open"), "says")


def _versus(finding: Finding) -> Table:
    columns = [
        Column("case", lambda row: row.when or MISSING, numeric=False),
        Column("sync is", lambda row: f"{row.word} ({SMALL})" if row.is_small else row.word, numeric=False),
        Column(f"sync is better by {INTERVAL}", _effect),
        Column("needed", lambda row: _effect_text(row.needed, row).replace("+", "±", 1)),
        Column("pairs", lambda row: count(row.n)),
        Column("sync", lambda row: number(row.value, row.unit)),
        Column("local", lambda row: number(row.other, row.unit)),
        Column("p", lambda row: probability(row.p)),
        Column("p, same", lambda row: probability(row.p_same)),
        Column("measured", lambda row: row.what, numeric=False),
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


def _needed(row: Row) -> str:
    most = "" if row.at_most is None else f", and at most {number(row.at_most, row.unit)} {row.unit}".rstrip()
    return f"{_effect_text(row.needed, row)}{most}"


def _effect(row: Row | Versus) -> str:
    ends = interval(row.low, row.high, _difference_unit(row), sign=True)
    if row.is_ratio and ends != MISSING:
        ends = f"{_ratio_text(row.low)} to {_ratio_text(row.high)}"
    return _with_interval(_effect_text(row.effect, row), ends)


def _mean(value: float, low: float, high: float, unit: str) -> str:
    return _with_interval(number(value, unit), interval(low, high, unit))


def _effect_text(value: float, row: Row | Versus) -> str:
    """An effect with its unit: ``1.25 times``, ``+2.00 points``."""
    if not isfinite(value):
        return MISSING
    unit = _difference_unit(row)
    return f"{_ratio_text(value)} times" if row.is_ratio else f"{signed(value, unit)} {unit}".strip()


def _difference_unit(row: Row | Versus) -> str:
    return "points" if row.unit == "%" else row.unit


def _ratio_text(value: float) -> str:
    return f"{value:,.2f}" if 0.01 <= value < 1e6 else scientific(value)


def _with_interval(mean: str, ends: str) -> str:
    return mean if ends == MISSING else f"{mean} [{ends}]"
