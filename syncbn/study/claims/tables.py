"""Findings as tables: as text for the page, and with all digits for files."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from math import isfinite
from typing import Any

import pandas as pd

from syncbn.study.claims.finding import Finding, Published, Row, Versus
from syncbn.study.tables import Table
from syncbn.study.wording import MISSING, count, interval, number, probability, scientific, signed

NOT_ASKED = "not asked"
INTERVAL = "[95\u00a0%]"  # in heads: on one line
_TONES = {"yes": "better", "no": "worse", "better": "better", "worse": "worse", "": ""}
_ABOUT = ["study", "number"]


def verdict(finding: Finding, side: str) -> tuple[str, str]:
    """In words, and its tone: "better", "partly", "worse", "open" or "unused"."""
    words = finding.verdicts.get(side, NOT_ASKED)
    for start, tone in (
        ("holds only", "partly"),
        ("holds", "better"),
        ("does not hold", "worse"),
        (NOT_ASKED, "unused"),
    ):
        if words.startswith(start):
            return words, tone
    return words, "open"


def norms(findings: Iterable[Finding]) -> list[str]:
    """That one of the claims is about, in order."""
    return list(dict.fromkeys(side for finding in findings for side in finding.sides))


def build(finding: Finding) -> dict[str, Table]:
    """Those of one claim that have rows, by name."""
    made = {"cases": _cases(finding), "versus": _versus(finding), "published": _published(finding)}
    return {name: table for name, table in made.items() if table.rows}


def runs(findings: Sequence[Finding]) -> Table:
    """What was run for each claim, and in all."""
    rows = [
        [f"{one.number}. {one.text}", *map(count, (one.seeds, one.runs, one.finished, one.diverged))]
        for one in findings
    ]
    if len(findings) > 1:
        sums = [sum(getattr(one, name) for one in findings) for name in ("runs", "finished", "diverged")]
        rows.append(["all", MISSING, *map(count, sums)])
    heads = ["claim", "seeds", "runs to be made", "with a result", "of these diverged"]
    return Table("verdicts", heads, [False, True, True, True, True], rows, [""] * len(rows))


def frames(findings: Sequence[Finding], files: Sequence[Sequence[str]]) -> dict[str, pd.DataFrame]:
    """All digits, by the name of the file.

    Args:
        findings: as they are.
        files: the names of the plots' files, for each of the findings.
    """
    about = [{"study": one.study, "number": one.number} for one in findings]
    verdicts = [
        {**which, "text": one.text, "side": side, "verdict": verdict(one, side)[0]}
        | {name: getattr(one, name) for name in ("seeds", "alpha", "runs", "finished", "diverged")}
        for which, one in zip(about, findings, strict=True)
        for side in one.sides
    ]
    points = [
        one.frame.assign(**which, plot=file)
        for which, finding, names in zip(about, findings, files, strict=True)
        for one, file in zip(finding.plots, names, strict=True)
    ]
    columns = [*_ABOUT, "plot", "panel", "side", "series", "x", "n", "mean", "low", "high"]
    heads = [*_ABOUT, "text", "side", "verdict", "seeds", "alpha", "runs", "finished", "diverged"]
    return {
        "verdicts": pd.DataFrame(verdicts, columns=heads),
        "cases": _frame(about, [one.rows for one in findings], Row),
        "versus": _frame(about, [one.versus for one in findings], Versus),
        "published": _frame(about, [one.published for one in findings], Published),
        "plots": pd.concat([pd.DataFrame(columns=columns), *points])[columns]
        if points
        else pd.DataFrame(columns=columns),
    }


def _frame(about: Sequence[dict[str, Any]], parts: Sequence[Sequence[Any]], kind: type) -> pd.DataFrame:
    rows = [which | asdict(row) for which, part in zip(about, parts, strict=True) for row in part]
    return pd.DataFrame(rows, columns=[*_ABOUT, *(field.name for field in fields(kind))])


def _cases(finding: Finding) -> Table:
    columns = {
        "case": False,
        "norm": False,
        "says": False,
        f"better by {INTERVAL}": True,
        "needed": True,
        "pairs": True,
    }
    columns |= {f"norm's mean {INTERVAL}": True, "held against": False, f"its mean {INTERVAL}": True}
    columns |= {"p, yes": True, "p, no": True, "measured": False}
    rows = [
        [
            row.when or MISSING,
            row.side,
            row.says,
            _effect(row),
            _in_words(row.needed, row),
            count(row.n),
            _with_interval(number(row.value, row.unit), interval(row.value_low, row.value_high, row.unit)),
            row.against,
            _with_interval(number(row.other, row.unit), interval(row.other_low, row.other_high, row.unit)),
            probability(row.p_yes),
            probability(row.p_no),
            row.what,
        ]
        for row in finding.rows
    ]
    return _table("cases", columns, rows, "says")


def _versus(finding: Finding) -> Table:
    columns = {"case": False, "sync is": False, f"sync is better by {INTERVAL}": True, "pairs": True, "sync": True}
    columns |= {"local": True, "p": True, "measured": False}
    rows = [
        [
            row.when or MISSING,
            row.word,
            _effect(row),
            count(row.n),
            number(row.value, row.unit),
            number(row.other, row.unit),
            probability(row.p),
            row.what,
        ]
        for row in finding.versus
    ]
    return _table("versus", columns, rows, "sync is")


def _published(finding: Finding) -> Table:
    columns = {"what": False, "published": False, "ours": False, "agrees": False, "source": False}
    rows = [
        [row.what, row.published or MISSING, row.ours, row.agrees or MISSING, row.source] for row in finding.published
    ]
    return _table("published", columns, rows, "agrees")


def _table(name: str, columns: dict[str, bool], rows: list[list[str]], telling: str) -> Table:
    at = list(columns).index(telling)
    tones = [_TONES.get(row[at], "open") for row in rows]
    return Table(name, list(columns), list(columns.values()), rows, tones, telling)


def _effect(row: Row | Versus) -> str:
    if row.is_ratio:
        ends = f"{_ratio(row.low)} to {_ratio(row.high)}" if isfinite(row.low) and isfinite(row.high) else MISSING
    else:
        ends = interval(row.low, row.high, _points(row), sign=True)
    return _with_interval(_in_words(row.effect, row), ends)


def _in_words(value: float, row: Row | Versus) -> str:
    """1.25 times, +2.00 points."""
    if not isfinite(value):
        return MISSING
    return f"{_ratio(value)} times" if row.is_ratio else f"{signed(value, _points(row))} {_points(row)}".strip()


def _points(row: Row | Versus) -> str:
    """The unit of a difference."""
    return "points" if row.unit == "%" else row.unit


def _ratio(value: float) -> str:
    return f"{value:,.2f}" if 0.01 <= value < 1e6 else scientific(value)


def _with_interval(mean: str, ends: str) -> str:
    return mean if ends == MISSING else f"{mean} [{ends}]"
