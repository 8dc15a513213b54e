"""Tables of findings: rounded text for the page, and all digits for CSV files."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from math import isfinite
from typing import Any

import pandas as pd

from syncbn.study.claims.result import Finding, Published, Row, Versus
from syncbn.study.format import MISSING, count, interval, number, probability, scientific, signed
from syncbn.study.report.tables import Table

NOT_ASKED, MEASURED = "not asked", "measured"
INTERVAL = "[95\u00a0%]"  # a non-breaking space, for table heads
SMALL = "less than what matters"
_TONES = {"yes": "better", "no": "worse", "better": "better", "worse": "worse", "": ""}
_ABOUT = ["study", "number"]
_OF_ALL = ["baseline", "sharing", "seeds", "alpha", "runs", "finished", "diverged"]


def worded_verdict(finding: Finding, side: str) -> tuple[str, str]:
    """The verdict on a side in words, and its tone: "better", "partly", "worse", "open" or "unused"."""
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
    """Tables with all digits, by the name of their CSV file.

    Args:
        findings: one for each claim.
        files: for each finding, the names of its plots' files.
    """
    about = [{"study": one.study, "number": one.number} for one in findings]
    verdicts = [
        {**which, "text": one.text, "side": side, "verdict": worded_verdict(one, side)[0]}
        | {name: getattr(one, name) for name in _OF_ALL}
        for which, one in zip(about, findings, strict=True)
        for side in one.sides
    ]
    points = [
        one.frame.assign(**which, plot=file)
        for which, finding, names in zip(about, findings, files, strict=True)
        for one, file in zip(finding.plots, names, strict=True)
    ]
    columns = [*_ABOUT, "plot", "panel", "side", "series", "x", "n", "mean", "low", "high"]
    heads = [*_ABOUT, "text", "side", "verdict", *_OF_ALL]
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
            _needed(row),
            count(row.n) if row.n >= row.planned else f"{row.n} of {row.planned}",
            _with_interval(number(row.value, row.unit), interval(row.value_low, row.value_high, row.unit)),
            row.against,
            _with_interval(number(row.other, row.unit), interval(row.other_low, row.other_high, row.unit)),
            *(MISSING if row.says == MEASURED else probability(p) for p in (row.p_yes, row.p_no)),
            row.what,
        ]
        for row in finding.rows
    ]
    return _table("cases", columns, rows, "says", [row.says for row in finding.rows])


def _versus(finding: Finding) -> Table:
    columns = {"case": False, "sync is": False, f"sync is better by {INTERVAL}": True, "needed": True, "pairs": True}
    columns |= {"sync": True, "local": True, "p": True, "p, same": True, "measured": False}
    rows = [
        [
            row.when or MISSING,
            f"{row.word} ({SMALL})" if row.is_small else row.word,
            _effect(row),
            _effect_text(row.needed, row).replace("+", "±", 1),
            count(row.n),
            number(row.value, row.unit),
            number(row.other, row.unit),
            probability(row.p),
            probability(row.p_same),
            row.what,
        ]
        for row in finding.versus
    ]
    words = [SMALL if row.is_small else row.word for row in finding.versus]  # a small effect has no colour
    return _table("versus", columns, rows, "sync is", words)


def _published(finding: Finding) -> Table:
    columns = {"what": False, "published": False, "ours": False, "agrees": False, "source": False}
    rows = [
        [row.what, row.published or MISSING, row.ours, row.agrees or MISSING, row.source] for row in finding.published
    ]
    return _table("published", columns, rows, "agrees", [row[3] for row in rows])


def _table(name: str, columns: dict[str, bool], rows: list[list[str]], telling: str, words: Sequence[str]) -> Table:
    """A table whose rows have the tone of their word."""
    tones = [_TONES.get(word, "open") for word in words]
    return Table(name, list(columns), list(columns.values()), rows, tones, telling)


def _needed(row: Row) -> str:
    most = "" if row.at_most is None else f", and at most {number(row.at_most, row.unit)} {row.unit}".rstrip()
    return f"{_effect_text(row.needed, row)}{most}"


def _effect(row: Row | Versus) -> str:
    if row.is_ratio:
        ends = (
            f"{_ratio_text(row.low)} to {_ratio_text(row.high)}"
            if isfinite(row.low) and isfinite(row.high)
            else MISSING
        )
    else:
        ends = interval(row.low, row.high, _difference_unit(row), sign=True)
    return _with_interval(_effect_text(row.effect, row), ends)


def _effect_text(value: float, row: Row | Versus) -> str:
    """An effect with its unit: ``1.25 times``, ``+2.00 points``."""
    if not isfinite(value):
        return MISSING
    return (
        f"{_ratio_text(value)} times"
        if row.is_ratio
        else f"{signed(value, _difference_unit(row))} {_difference_unit(row)}".strip()
    )


def _difference_unit(row: Row | Versus) -> str:
    """The unit of a difference."""
    return "points" if row.unit == "%" else row.unit


def _ratio_text(value: float) -> str:
    return f"{value:,.2f}" if 0.01 <= value < 1e6 else scientific(value)


def _with_interval(mean: str, ends: str) -> str:
    return mean if ends == MISSING else f"{mean} [{ends}]"
