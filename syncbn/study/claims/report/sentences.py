"""Sentences of the page: verdicts with their main figure, reasons why cases are undecided, and reasons for doubt."""

from collections.abc import Iterable, Sequence
from math import inf, nan

from syncbn.study.claims.report.matrix import FAILED, HELD, IN_WORDS, PARTLY, UNKNOWN, Cell, clause, norm_cell
from syncbn.study.claims.result import CaseLabel, Finding, Row, Versus
from syncbn.study.claims.verdict import MEASURED, UNDECIDED, with_interval, without_unit
from syncbn.study.format import cut, plural, rounded

CLIPPED = "Intervals of means end at the limits of the metric: an error is between 0 and 100 %."


def verdict_sentence(one: Finding, side: str) -> tuple[str, str]:
    """The verdict on a norm, and the main figure behind it. If the claim holds in part, also where it fails."""
    cell = norm_cell(one, side)
    verdict = f"With {IN_WORDS.get(side, side)}, the claim {clause(cell)}."
    row = _main_row(one, side, cell)
    return verdict, " ".join(filter(None, [_figure(row) if row else "", _where_it_fails(one, side, cell)]))


def clipped(low: float, high: float, label: CaseLabel | None) -> tuple[float, float]:
    """The ends of an interval of a mean, within the limits of its metric."""
    if label is None:
        return low, high
    return cut(low, high, -inf if label.least is None else label.least, inf if label.most is None else label.most)


def undecided(one: Finding) -> list[str]:
    """A line on the undecided cases of the norms, and one on those of sharing; with the reason."""
    judged = [row for row in one.rows if row.says != MEASURED]
    open_rows = [row for row in judged if row.says == "open" and row.n]
    sharing = [case for case in one.versus if case.word == UNDECIDED and case.n]
    lines = [_why_open(one, open_rows, len(judged))] if open_rows else []
    return lines + ([_why_sharing_is_open(one, sharing)] if sharing else [])


def doubts(findings: Sequence[Finding]) -> list[str]:
    """What a reader should know before believing the page. Equal lines of several claims are one line."""
    return [
        *_problems(findings),
        *_left_out(findings),
        *_diverged(findings),
        *_meaning_of_undecided(findings),
        *_disagreeing(findings),
    ]


def _main_row(one: Finding, side: str, cell: Cell) -> Row | None:
    """The row whose figure supports the verdict. An undecided row is never the main figure."""
    answers = {HELD: "yes", PARTLY: "yes", FAILED: "no", UNKNOWN: "no"}
    rows = (row for row in one.rows if row.side == side and row.says == answers.get(cell.symbol) and row.n)
    return next(rows, None)


def _where_it_fails(one: Finding, side: str, cell: Cell) -> str:
    """``It fails in 2 cases: with tanh; with ReLU.``, for a claim that holds in part."""
    rows = [row for row in one.rows if row.side == side and row.says == "no" and row.n and row.when]
    if cell.symbol != PARTLY or not rows:
        return ""
    return f"It fails in {plural(len(rows), 'case')}: {'; '.join(row.when for row in rows)}."


def _figure(row: Row) -> str:
    """``At the same rate: steps 54 against 116 with no norm, better by 2.12 times [1.62 to 2.77], 8 seeds.``"""
    ends = [(row.value_low, row.value_high), (row.other_low, row.other_high)]
    if not row.is_ratio:
        ends = [(row.low, row.high)] * 2  # so that the two numbers and their difference have the same decimals
    values = [rounded(value, *of) for value, of in zip((row.value, row.other), ends, strict=True)]
    both = f"{values[0]} against {values[1]} {row.unit}".rstrip()
    limit = f" (above the limit of {row.at_most:g} {row.unit}".rstrip() + ")" if _is_above(row) else ""
    what = ", ".join(filter(None, [row.when, without_unit(row.what, row.unit)]))
    name = IN_WORDS.get(row.against, row.against)
    return f"{what[:1].upper()}{what[1:]}: {both} with {name}, {improvement(row)}{limit}, {plural(row.n, 'seed')}."


def improvement(row: Row) -> str:
    """``better by a factor of 2.12 [1.62 to 2.77]``, ``worse by 3.2 points [2.0 to 4.4]``."""
    effect, low, high = row.effect, row.low, row.high
    if row.is_ratio and effect < 1:
        return f"worse by a factor of {with_interval(1 / effect, *_inverse(low, high))}"
    if row.is_ratio:
        return f"better by a factor of {with_interval(effect, low, high)}"
    if effect < 0:
        return f"worse by {with_interval(-effect, -high, -low, effect_unit(row))}"
    return f"better by {with_interval(effect, low, high, effect_unit(row))}"


def _inverse(low: float, high: float) -> tuple[float, float]:
    return (1 / high if high else nan), (1 / low if low else nan)


def _is_above(row: Row) -> bool:
    return row.at_most is not None and row.says == "no" and row.value > row.at_most


def _why_open(one: Finding, rows: Sequence[Row], tests: int) -> str:
    by_case = dict[str, list[Row]]()
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    parts = [f"{_when(of[0])}{', '.join(map(_open_effect, of))}" for of in by_case.values()]
    needed = _either(dict.fromkeys(f"{row.needed:g} {effect_unit(row)}".rstrip() for row in rows))
    limits = dict.fromkeys(f"{row.at_most:g} {row.unit}".rstrip() for row in rows if row.at_most is not None)
    most = f" and a mean of at most {_either(limits)}" if limits else ""
    return (
        f"Why undecided: {'; '.join(parts)}. The rule needs {needed}{most}. {_seeds(rows)} are too few to show either"
        f" answer at the level {one.alpha:g} after correction for {plural(tests, 'test')}; the intervals are without"
        " that correction."
    )


def _why_sharing_is_open(one: Finding, cases: Sequence[Versus]) -> str:
    parts = [f"{_when(case)}{_effect(case)}" for case in cases]
    return (
        f"Why it is undecided whether sharing pays (above {'1' if cases[0].is_ratio else '0'}, sync is better than"
        f" local): {'; '.join(parts)}. {_seeds(cases)} show neither a difference nor its absence at the level"
        f" {one.alpha:g} after correction for {plural(len(one.versus), 'case')}."
    )


def _open_effect(row: Row) -> str:
    """The effect on a norm, and its mean if the rule limits it."""
    mean = (
        f", mean {with_interval(row.value, row.value_low, row.value_high, row.unit)}" if row.at_most is not None else ""
    )
    return f"{row.side} {_effect(row)}{mean}"


def _when(row: Row | Versus) -> str:
    return f"{row.when}: " if row.when else ""


def _effect(row: Row | Versus) -> str:
    return with_interval(row.effect, row.low, row.high, effect_unit(row), sign=not row.is_ratio)


def effect_unit(row: Row | Versus) -> str:
    """The unit of an effect."""
    return "times" if row.is_ratio else "points" if row.unit == "%" else row.unit


def _either(words: Iterable[str]) -> str:
    """Alternatives in a sentence: ``10 points or 2 points``."""
    return " or ".join(words)


def _seeds(rows: Sequence[Row | Versus]) -> str:
    least, most = (f(row.n for row in rows) for f in (min, max))
    return plural(least, "seed") if least == most else f"{least} to {most} seeds"


def _problems(findings: Sequence[Finding]) -> Iterable[str]:
    """Lines on missing and failed runs and the like, with the claims they concern."""
    claims = dict[str, list[str]]()
    for one in findings:
        for line in dict.fromkeys(one.problems):
            claims.setdefault(line, []).append(f"{one.number}. {one.text}")
    for line, names in claims.items():
        yield f"{'; '.join(names)}: {line}" if len(findings) > 1 else line


def _left_out(findings: Sequence[Finding]) -> Iterable[str]:
    those = [one for one in findings if one.left_out]
    if those:
        cases = plural(sum(len(one.left_out) for one in those), "case")
        yield f"The budget leaves out runs of {cases}{_in_claims(those, findings)}. The details list them."


def _in_claims(those: Sequence[Finding], findings: Sequence[Finding]) -> str:
    """`` (claims 1, 3)``; "" if there is only one claim."""
    numbers = ", ".join(str(one.number) for one in those)
    return f" ({'claim' if len(those) == 1 else 'claims'} {numbers})" if len(findings) > 1 else ""


def _diverged(findings: Sequence[Finding]) -> Iterable[str]:
    those = [one for one in findings if one.diverged]
    if those:
        count = f"{sum(one.diverged for one in those):,} of {plural(sum(one.finished for one in findings), 'run')}"
        where = ", ".join(f"claim {one.number}: {one.diverged:,}" for one in those)
        yield f"{count} diverged ({where}). Each counts with its test error, and its learning rate as not usable."


def _meaning_of_undecided(findings: Sequence[Finding]) -> Iterable[str]:
    cells = [norm_cell(one, side) for one in findings for side in one.sides]
    if any(cell.symbol == UNKNOWN for cell in cells) or any(one.versus for one in findings):
        yield (
            "Undecided (?) means that the seeds are too few to tell. It does not mean that there is no effect."
            " Tests are corrected for all cases and norms of a claim, so a case can be undecided although its own 95 %"
            " interval excludes zero."
        )
    yield (
        "All seeds have the same training and test images. Intervals cover initialization and the order of the data,"
        " not other data, other networks or other sizes."
    )


def _disagreeing(findings: Sequence[Finding]) -> Iterable[str]:
    compared = [figure for one in findings for figure in one.published if figure.agrees]
    those = [one for one in findings if any(figure.agrees == "no" for figure in one.published)]
    if those:
        no = sum(figure.agrees == "no" for figure in compared)
        yield (
            f"{no} of {plural(len(compared), 'figure')} expected from earlier work {'differs' if no == 1 else 'differ'}"
            f" from ours by more than the tolerance{_in_claims(those, findings)}. The details list them."
        )
