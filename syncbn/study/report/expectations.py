"""The first part of a study's page: which effects were expected before the runs, and whether they appear."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from syncbn.study.format import plural, rounded, rounded_interval
from syncbn.study.report.blocks import Block, Group, bullets, escape

APPEARS, MISSES, UNDECIDED, NOT_RUN = "appears", "does not appear", "undecided", "not run"
SYMBOLS = {MISSES: "✗", UNDECIDED: "?", NOT_RUN: "—", APPEARS: "✓"}  # in the order of the page


@dataclass(frozen=True)
class Answer:
    """An expected effect, and what the runs show of it.

    Attributes:
        text: the expectation, a clause.
        answer: a key of ``SYMBOLS``.
        found: the numbers in words; "" without any.
        needed: the rule in words.
    """

    text: str
    answer: str
    found: str
    needed: str


@dataclass(frozen=True)
class Measured:
    """The paired numbers behind an answer, as they are shown.

    Attributes:
        side, other: what is compared, in words: ``local at 4``.
        value, other_value: their means.
        difference, low, high: mean of the paired differences, and its 95 % interval.
        n: number of pairs.
        metric, unit, difference_unit: of the metric.
    """

    side: str
    other: str
    value: float
    other_value: float
    difference: float
    low: float
    high: float
    n: int
    metric: str
    unit: str
    difference_unit: str


def in_words(m: Measured) -> str:
    """``test mIoU: 22.8 (local at 4) against 38.5 % (local at 1), −15.7 points [−18.0, −13.4], 8 seeds``."""
    value, other = (rounded(each, m.low, m.high) for each in (m.value, m.other_value))
    by = f"{rounded(m.difference, m.low, m.high, sign=True)} {m.difference_unit}".rstrip()
    interval = ""
    if isfinite(m.low):
        interval = f" [{rounded_interval(m.low, m.high, sign=True, between=', ')}]"
    return (
        f"{m.metric}: {value} ({m.side}) against {other}{f' {m.unit}' if m.unit else ''} ({m.other}), {by}{interval}, "
        f"{plural(m.n, 'seed')}"
    )


def sentence(answers: Sequence[Answer]) -> str:
    """``3 of 5 expected effects appear; 1 does not appear; 1 is undecided.``; "" without any."""
    if not answers:
        return ""
    counts = {kind: sum(each.answer == kind for each in answers) for kind in SYMBOLS}
    clauses = [
        f"{count} {'is' if count == 1 else 'are'} {kind}" if kind != MISSES else f"{count} {_verb(count)} not appear"
        for kind, count in counts.items()
        if count and kind != APPEARS
    ]
    verb = "appears" if counts[APPEARS] == 1 else "appear"
    whole = f"{counts[APPEARS]} of {plural(len(answers), 'expected effect')} {verb}"
    return "; ".join([whole, *clauses]) + "."


def blocks(answers: Sequence[Answer]) -> list[Block | Group]:
    """The blocks of the page: effects that do not appear are first. Nothing without expectations."""
    if not answers:
        return []
    rule = (
        "Each rule was written before the runs, with the least difference that matters. An effect appears if a"
        " one-sided paired t test shows at least that difference. It does not appear if the test shows less."
        " Otherwise it is undecided. No difference is shown by two one-sided tests. The level is 0.01, corrected for"
        " all rules of the study (Holm 1979). Intervals are 95 %, without that correction."
    )
    return [
        Block(f"**{escape(sentence(answers))}**", "verdict"),
        Block(bullets(lines(answers)), "expectations"),
        Group(
            [Block(escape(rule)), Block(bullets(f"{each.text}: {each.needed}" for each in answers))],
            "details",
            summary="The rules",
        ),
    ]


def lines(answers: Sequence[Answer]) -> list[str]:
    """A line for each effect; those that do not appear are first."""
    return [line(each) for each in sorted(answers, key=lambda each: list(SYMBOLS).index(each.answer))]


def line(each: Answer) -> str:
    """``✓ per-device statistics lose mIoU on four devices: appears (test mIoU: ...)``."""
    found = f" ({each.found})" if each.found else ""
    return f"{SYMBOLS[each.answer]} {each.text}: {each.answer}{found}"


def _verb(count: int) -> str:
    return "does" if count == 1 else "do"
