"""States the verdicts on a claim in words, from the answers of its cases."""

from collections.abc import Sequence
from math import nan

from syncbn.study.claims.result import Row, Versus
from syncbn.study.format import MISSING, plural, rounded, rounded_interval, span

HOLDS, FAILS, NOT_ASKED, NOT_RUN = "holds", "does not hold", "not asked", "not run"
MEASURED = "measured"  # the answer of a case that does not count for the verdict
BETTER, WORSE, SAME, UNDECIDED = "better", "worse", "no difference", "not decided"  # words of Versus


def verdict(rows: Sequence[Row]) -> str:
    """The verdict on one side from its rows. While seeds are missing, it names the number of finished seeds."""
    if not rows:
        return NOT_ASKED
    if not any(row.n for row in rows):
        return NOT_RUN
    words, short = _verdict_by_answers(rows), [row for row in rows if row.n < row.planned]
    if not short:
        return words
    return f"{words} (so far, by {_pairs_text(short)} of {plural(max(row.planned for row in short), 'seed')})"


def _verdict_by_answers(rows: Sequence[Row]) -> str:
    yes, no, undecided = ([row for row in rows if row.says == word and row.n] for word in ("yes", "no", "open"))
    missing = [row for row in rows if not row.n]
    rest = f"; {NOT_RUN} {_joined_conditions(missing)}" if missing else ""
    if len(yes) == len(rows):
        return HOLDS
    if yes:
        if undecided:
            rest = f"; {UNDECIDED} {_joined_conditions(undecided)} by {_seeds_text(undecided)}{rest}"
        return f"{HOLDS} only {_joined_conditions(yes)}{rest}"
    if not undecided:
        return f"{FAILS} {_joined_conditions(no)}{rest}" if missing else FAILS
    if not no:
        return f"{UNDECIDED} by {_seeds_text(undecided)}{rest}"
    fails = f"{FAILS} {_joined_conditions(no)}"
    return f"{UNDECIDED} by {_seeds_text(undecided)} {_joined_conditions(undecided)}; {fails}{rest}"


def sentences(versus: Sequence[Versus], word: str) -> list[str]:
    """One sentence for each case in which ``sync`` is "better", or "worse", than ``local``."""
    return [_sentence(one) for one in versus if one.word == word]


def sharing(versus: Sequence[Versus]) -> str:
    """Synchronized compared with per-device statistics in a few words; "" if no case has both."""
    told = []
    for word in (BETTER, WORSE):
        if there := [one for one in versus if one.word == word and not one.is_small]:
            told.append(f"{word} {_joined_conditions(there)}".rstrip())
    if told or not versus:
        return "; ".join(told)
    if all(one.word == SAME or one.is_small for one in versus):
        return SAME
    return NOT_RUN if all(one.word == NOT_RUN for one in versus) else UNDECIDED


def with_interval(value: float, low: float, high: float, unit: str = "", *, sign: bool = False) -> str:
    """A number with its unit and interval, ``3.2 points [2.0 to 4.4]``; without an interval, only the number."""
    ends = rounded_interval(low, high, sign=sign)
    interval = "" if ends == MISSING or low == high else f"[{ends}]"
    return " ".join(filter(None, [rounded(value, low, high, sign=sign), unit, interval]))


def without_unit(what: str, unit: str) -> str:
    """A measured quantity without the unit at its end: "test error" for "test error, %"."""
    return what.removesuffix(f", {unit}") if unit else what


def _sentence(v: Versus) -> str:
    when = f"{v.when[0].upper()}{v.when[1:]}, s" if v.when else "S"
    ends = (nan, nan) if v.is_ratio else (v.low, v.high)  # a ratio's interval does not suit the two numbers
    both = f"{rounded(v.value, *ends)} against {rounded(v.other, *ends)} {v.unit}".rstrip()
    by = (v.effect, v.low, v.high)
    if v.word == WORSE:
        by = (1 / v.effect, 1 / v.high, 1 / v.low) if v.is_ratio else (-v.effect, -v.high, -v.low)
    kind = "" if v.is_ratio else "points" if v.unit == "%" else v.unit
    how_much, seeds = "a factor of " * v.is_ratio + with_interval(*by, kind), plural(v.n, "seed")
    small = f", less than the {v.needed:g} {kind}".rstrip() + " that would matter" if v.is_small else ""
    what = without_unit(v.what, v.unit)
    return (
        f"{when}ynchronized statistics are {v.word} than per-device ones by {how_much}{small}: {what} {both}, {seeds}."
    )


def _joined_conditions(rows: Sequence[Row | Versus]) -> str:
    whens = list(dict.fromkeys(row.when for row in rows))
    return ("; " if any(" and " in when or "," in when for when in whens) else " and ").join(whens)


def _seeds_text(rows: Sequence[Row]) -> str:
    return f"{_pairs_text(rows)} seed{'' if {row.n for row in rows} == {1} else 's'}"


def _pairs_text(rows: Sequence[Row]) -> str:
    """The number of pairs in these rows: ``4``, ``4 to 6``."""
    return span(*(str(f(row.n for row in rows)) for f in (min, max)))
