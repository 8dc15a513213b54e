"""States the verdicts on a claim in words, from the answers of its cases."""

import math
from collections.abc import Sequence

from syncbn.study.claims.result import Row, Versus
from syncbn.study.format import number, plural, span

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


def effect_text(effect: float, low: float, high: float, unit: str, is_ratio: bool) -> str:
    """``2.31 times [1.90, 2.80]``, ``3.20 points [2.00, 4.40]``; without an interval, only the effect."""
    kind = "times" if is_ratio else "points" if unit == "%" else ""
    if is_ratio:
        unit = "%" if effect >= 0.1 else ""  # two decimals for ratios of 0.1 or more
    interval = f"[{number(low, unit)}, {number(high, unit)}]" if math.isfinite(low) else ""
    return " ".join(filter(None, [number(effect, unit), kind, interval]))


def _sentence(v: Versus) -> str:
    when = f"{v.when[0].upper()}{v.when[1:]}, s" if v.when else "S"
    unit = f" {v.unit}" if v.unit else ""
    both = f"{number(v.value, v.unit)} against {number(v.other, v.unit)}{unit}"
    by = (v.effect, v.low, v.high)
    if v.word == WORSE:
        by = (1 / v.effect, 1 / v.high, 1 / v.low) if v.is_ratio else (-v.effect, -v.high, -v.low)
    kind = " times" if v.is_ratio else " points" if v.unit == "%" else ""
    small = f", which is less than the {v.needed:g}{kind} that would matter" if v.is_small else ""
    how_much = effect_text(*by, v.unit, v.is_ratio)
    what = v.what.replace(f", {v.unit}", "", 1) if v.unit else v.what
    seeds = plural(v.n, "seed")
    return f"{when}ynchronized statistics do {v.word} than per-device ones: {what} {both}, {how_much}, {seeds}{small}."


def _joined_conditions(rows: Sequence[Row | Versus]) -> str:
    whens = list(dict.fromkeys(row.when for row in rows))
    return ("; " if any(" and " in when or "," in when for when in whens) else " and ").join(whens)


def _seeds_text(rows: Sequence[Row]) -> str:
    return f"{_pairs_text(rows)} seed{'' if {row.n for row in rows} == {1} else 's'}"


def _pairs_text(rows: Sequence[Row]) -> str:
    """The number of pairs in these rows: ``4``, ``4 to 6``."""
    return span(*(str(f(row.n for row in rows)) for f in (min, max)))
