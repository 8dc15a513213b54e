"""Hypothesis tests of a claim's rule: is a norm better than the side it is compared with, by the required effect?

For each seed, e is the improvement of the norm: a difference, or the log of a ratio. d is the effect that the rule
requires, or its log. Two one-sided paired t tests decide whether the mean of e is above d ("yes") or below d ("no").
Each of the two families of tests is Holm-corrected for all rows of the claim. If neither is shown, the answer is
"open". If all e are equal, the t test is undefined, because the standard deviation is 0. Then p is 2^-n for the
direction from d to e (the exact sign test, as in :mod:`syncbn.study.compare.paired_tests`).

A case can also require that the norm's own number is small. Then "yes" needs both conditions shown: p is the larger p
(intersection-union test, Berger 1982). "no" needs one of the two conditions refuted: p is twice the smaller p
(Bonferroni).

An effect can be a bound. If one pair's effect is a lower bound, "no" cannot be shown. If one is an upper bound, "yes"
cannot be shown. In these cases p is NaN, and it still counts as a test of its family.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from syncbn.study.claims.readings import Results, exp, of_effect
from syncbn.study.claims.result import Row, Versus
from syncbn.study.claims.rule import Case, Reading
from syncbn.study.claims.verdict import BETTER, MEASURED, NOT_RUN, SAME, UNDECIDED, WORSE
from syncbn.study.compare import paired_tests
from syncbn.study.compare.compare import ALPHA
from syncbn.study.compare.runs import metric as metrics
from syncbn.study.compare.runs.metric import Metric

SYNC, LOCAL = "sync", "local"
# What cannot be shown, by whether some effect is a lower bound and whether some effect is an upper bound.
NOTHING = {(False, False): ""}
HELP = NOTHING | {
    (True, False): "so the answer cannot be no",
    (False, True): "so the answer cannot be yes",
    (True, True): "so the answer can be neither yes nor no",
}
SHARE = NOTHING | {
    (True, False): "so neither worse nor no difference can be shown",
    (False, True): "so neither better nor no difference can be shown",
    (True, True): "so neither a difference nor its absence can be shown",
}


@dataclass
class Pairs:
    """Paired numbers of two sides, one pair for each seed that has both numbers and a finite effect.

    Attributes:
        side: numbers of the side.
        other: numbers of the side it is compared with.
        effects: improvement of the side: a difference, or the log of a ratio.
        resolution: effects that vary by no more than this count as equal.
        left_out: seeds with both numbers but no finite effect, each with the reason.
        is_least: whether some effect is a lower bound: the true effect is this or larger.
        is_most: whether some effect is an upper bound.
    """

    side: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)
    resolution: float = 0.0
    left_out: list[str] = field(default_factory=list)
    is_least: bool = False
    is_most: bool = False


def rows(cases: Sequence[Case], results: Results) -> list[Row]:
    """Tests every case for each of its sides."""
    every = [_tested_row(case, side, results) for case in cases for side in case.sides]
    judged = [row for row in every if not row.says]
    corrected = zip(
        *(holm_corrected([getattr(row, name) for row in judged]) for name in ("p_yes", "p_no")), strict=True
    )
    return [row if row.says else _with_answer(row, *next(corrected)) for row in every]


def versus(cases: Sequence[Case], results: Results) -> list[Versus]:
    """Compares synchronized with per-device statistics in every case that counts and has both sides."""
    judged = [_sync_against_local(case, results) for case in cases if case.counts and {SYNC, LOCAL} <= {*case.sides}]
    different, same = (holm_corrected([getattr(one, name) for one in judged]) for name in ("p", "p_same"))
    return [_with_word(*each) for each in zip(judged, different, same, strict=True)]


def pairs(case: Case, side: tuple[Reading, str], other: tuple[Reading, str], results: Results) -> Pairs:
    """Pairs the numbers of two sides by seed. A side is given by its reading and its name; the case has the effect."""
    found = Pairs()
    for seed in results.seeds(side[0].part):
        ours, theirs = (results.number(reading, name, seed) for reading, name in (side, other))
        if ours is None or theirs is None:
            continue
        effect = _effect(case, ours.value, theirs.value)
        if math.isfinite(effect):
            found.side.append(ours.value)
            found.other.append(theirs.value)
            found.effects.append(effect)
            is_least, is_most = of_effect(case.reading.wants, ours, theirs)
            found.is_least |= is_least
            found.is_most |= is_most
        else:
            found.left_out.append(f"seed {seed}: {ours.value:g} against {theirs.value:g} makes no {case.effect}")
    found.resolution = _resolution(results.measured(side[0]), case.is_ratio, [*found.side, *found.other])
    return found


def one_sided(values: Sequence[float], needed: float, resolution: float) -> tuple[float, float]:
    """p values of the tests that the mean is above, and below, ``needed``; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) <= resolution:
        beyond, signs = float(np.mean(values)) - needed, 2.0 ** -len(values)
        if abs(beyond) <= resolution:
            return 1.0, 1.0
        return (signs, 1.0) if beyond > 0 else (1.0, signs)
    above, below = (stats.ttest_1samp(values, needed, alternative=way).pvalue for way in ("greater", "less"))
    return float(above), float(below)


def _tested_row(case: Case, side: str, results: Results) -> Row:
    mine, theirs = (case.reading, side), (case.against, case.against_side)
    found, metric = pairs(case, mine, theirs, results), results.measured(case.reading)
    p_yes, p_no = _uncorrected(case, found, metric)
    low, high = paired_tests.mean_interval(found.effects)
    value_low, value_high = paired_tests.mean_interval(found.side)
    other_low, other_high = paired_tests.mean_interval(found.other)
    return Row(
        case=case.name,
        when=case.when,
        side=side,
        against=case.against_side,
        what=_what(case, metric),
        unit=metric.unit,
        n=len(found.effects),
        value=_mean(found.side),
        value_low=value_low,
        value_high=value_high,
        other=_mean(found.other),
        other_low=other_low,
        other_high=other_high,
        is_ratio=case.is_ratio,
        effect=_exp_if_ratio(case, _mean(found.effects)),
        low=_exp_if_ratio(case, low),
        high=_exp_if_ratio(case, high),
        needed=case.at_least,
        p_yes=p_yes,
        p_no=p_no,
        says="" if case.counts else MEASURED,
        at_most=case.at_most,
        planned=results.planned(mine, theirs),
        note=_note([*results.notes_on_bounds(mine, theirs), HELP[found.is_least, found.is_most]]),
    )


def _uncorrected(case: Case, found: Pairs, metric: Metric) -> tuple[float, float]:
    """Uncorrected p of "yes" and "no"; NaN if there are too few pairs or a bound forbids the answer."""
    yes, no = one_sided(found.effects, _log_if_ratio(case, case.at_least), found.resolution)
    if case.at_most is not None:
        above, below = one_sided(found.side, case.at_most, metrics.resolution(metric, found.side))
        yes, no = max(yes, below), min(1.0, 2 * min(no, above))
    return math.nan if found.is_most else yes, math.nan if found.is_least else no


def _sync_against_local(case: Case, results: Results) -> Versus:
    mine, theirs = (case.reading, SYNC), (case.reading, LOCAL)
    found, metric = pairs(case, mine, theirs, results), results.measured(case.reading)
    matters = case.at_least if case.is_ratio or metric.unit != "%" else min(case.at_least, metrics.MARGIN_POINTS)
    tested = paired_tests.effect(
        found.effects, [0.0] * len(found.effects), _log_if_ratio(case, matters), found.resolution
    )
    is_bound = found.is_most if tested.difference > 0 else found.is_least
    return Versus(
        case=case.name,
        when=case.when,
        what=_what(case, metric),
        unit=metric.unit,
        n=tested.n,
        value=_mean(found.side),
        other=_mean(found.other),
        is_ratio=case.is_ratio,
        effect=_exp_if_ratio(case, tested.difference),
        low=_exp_if_ratio(case, tested.low),
        high=_exp_if_ratio(case, tested.high),
        p=math.nan if is_bound else tested.p,
        word="",
        needed=matters,
        p_same=math.nan if found.is_least or found.is_most else tested.p_tost,
        note=_note([*results.notes_on_bounds(mine, theirs), SHARE[found.is_least, found.is_most]]),
    )


def _with_answer(row: Row, p_yes: float, p_no: float) -> Row:
    """Sets the corrected p values and the answer that follows from them."""
    return replace(row, p_yes=p_yes, p_no=p_no, says="yes" if p_yes < ALPHA else "no" if p_no < ALPHA else "open")


def _with_word(one: Versus, p: float, p_same: float) -> Versus:
    """As :func:`_with_answer`."""
    word = NOT_RUN if one.n < 2 else SAME if p_same < ALPHA else UNDECIDED
    if p < ALPHA:
        word = BETTER if one.effect > (1 if one.is_ratio else 0) else WORSE
    return replace(one, p=p, p_same=p_same, word=word, is_small=p < ALPHA and p_same < ALPHA)


def holm_corrected(ps: Sequence[float]) -> list[float]:
    """Holm-corrected p values. A NaN counts as a test with p = 1, and stays NaN."""
    corrected = paired_tests.holm([p if math.isfinite(p) else 1.0 for p in ps])
    return [new if math.isfinite(p) else math.nan for p, new in zip(ps, corrected, strict=True)]


def _what(case: Case, metric: Metric) -> str:
    """The measured quantity for display, with its unit."""
    return case.what or (f"{metric.label}, {metric.unit}" if metric.unit else metric.label)


def _note(notes: Sequence[str]) -> str:
    return "; ".join(filter(None, notes))


def _effect(case: Case, ours: float, theirs: float) -> float:
    """Improvement of ours over theirs; NaN if a ratio of the two is undefined."""
    sign = -1 if case.reading.wants == "lower" else 1
    if not case.is_ratio:
        return sign * (ours - theirs)
    if not (0 < ours < math.inf and 0 < theirs < math.inf):
        return math.nan
    return sign * (math.log(ours) - math.log(theirs))


def _log_if_ratio(case: Case, effect: float) -> float:
    return math.log(effect) if case.is_ratio else effect


def _exp_if_ratio(case: Case, effect: float) -> float:
    return exp(effect) if case.is_ratio else effect


def _resolution(metric: Metric, is_ratio: bool, values: Sequence[float]) -> float:
    """The resolution of effects. Metrics have single precision: accuracies to 1e-6, others to 1e-6 of their value."""
    if not is_ratio or not values:
        return metrics.resolution(metric, values)
    return metrics.resolution(metric, [1.0]) / (min(values) if metric.unit == "%" else 1.0)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
