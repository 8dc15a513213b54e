"""The rule's tests: how much better a norm is than what it is held against, and whether that is enough.

For each seed e is how much better the side does: a difference, or the log of a ratio. Enough is d, the effect that the
rule asks for, or its log. Two one-sided paired t tests say whether the mean of e is above d ("yes") or below it ("no");
each family of them is Holm-corrected for all rows of the claim, and what neither shows is "open". Where all e are one
number, which leaves a t test no spread to measure by, p is 2^-n on the side of d where it lies (the exact test of
signs, as in :mod:`syncbn.study.compare.paired_tests`).

Where a case asks that the side's own number be small as well, "yes" needs both shown (p is the larger; an
intersection-union test, Berger 1982), and "no" one of the two (twice the smaller, Bonferroni). A pair whose effect is a
lower bound allows no "no", one whose effect is an upper bound no "yes", whatever the others say: p is NaN, which stays
a member of its family.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from syncbn.study.claims import censored
from syncbn.study.claims.readings import Results, exp
from syncbn.study.claims.result import Row, Versus
from syncbn.study.claims.rules.rule import Case, Reading
from syncbn.study.claims.verdict import BETTER, NOT_RUN, SAME, UNDECIDED, WORSE
from syncbn.study.compare import paired_tests
from syncbn.study.compare.compare import ALPHA
from syncbn.study.compare.runs import metric as metrics
from syncbn.study.compare.runs.metric import Metric

SYNC, LOCAL = "sync", "local"
SAYS = ("yes", "no", "open")
MEASURED = "measured"  # of a case that is not judged
# What cannot be shown where an effect is a lower bound, an upper bound, or some are the one and some the other.
NOTHING = {(False, False): ""}
HELP = NOTHING | {
    (True, False): "so it cannot be shown not to help",
    (False, True): "so it cannot be shown to help",
    (True, True): "so it can be shown neither to help nor not to",
}
SHARE = NOTHING | {
    (True, False): "so sync cannot be shown to do worse, or the same",
    (False, True): "so sync cannot be shown to do better, or the same",
    (True, True): "so neither can be shown to do better, or the same",
}


@dataclass(frozen=True)
class Pairs:
    """Two sides, seed by seed.

    Attributes:
        side: numbers of the side, of the seeds for which there are both and an effect can be had from them.
        other: of what it is held against.
        effects: how much better the side does: a difference, or the log of a ratio.
        resolution: what effects may differ by and be the same.
        left_out: seeds that have both numbers but no effect, with why.
        is_least: an effect is a lower bound: the side truly does this well or better.
        is_most: an effect is an upper bound.
    """

    side: list[float]
    other: list[float]
    effects: list[float]
    resolution: float
    left_out: list[str]
    is_least: bool = False
    is_most: bool = False


def rows(cases: Sequence[Case], results: Results) -> list[Row]:
    """Every case for every side that it is about, as the rule judges it."""
    every = [_row(case, side, results) for case in cases for side in case.sides]
    judged = [row for row in every if not row.says]
    yes, no = (_corrected([getattr(row, name) for row in judged]) for name in ("p_yes", "p_no"))
    said = {
        (row.case, row.side): replace(
            row, p_yes=p_yes, p_no=p_no, says=SAYS[0] if p_yes < ALPHA else SAYS[1] if p_no < ALPHA else SAYS[2]
        )
        for row, p_yes, p_no in zip(judged, yes, no, strict=True)
    }
    return [said.get((row.case, row.side), row) for row in every]


def versus(cases: Sequence[Case], results: Results) -> list[Versus]:
    """Synchronized against per-device statistics, in every case that is judged and about both."""
    judged = [_versus(case, results) for case in cases if case.counts and {SYNC, LOCAL} <= {*case.sides}]
    different, same = (_corrected([getattr(one, name) for one in judged]) for name in ("p", "p_same"))
    return [_worded(*each) for each in zip(judged, different, same, strict=True)]


def pairs(case: Case, side: tuple[Reading, str], other: tuple[Reading, str], results: Results) -> Pairs:
    """Two sides by seed.

    Args:
        case: says what an effect is.
        side: how it is read, and its name.
        other: likewise.
        results: the runs.
    """
    found, least, most = Pairs([], [], [], 0.0, []), False, False
    for seed in results.seeds(side[0].part):
        ours, theirs = (results.number(reading, name, seed) for reading, name in (side, other))
        if ours is None or theirs is None:
            continue
        effect = _effect(case, ours.value, theirs.value)
        if math.isfinite(effect):
            found.side.append(ours.value)
            found.other.append(theirs.value)
            found.effects.append(effect)
            is_least, is_most = censored.of_effect(case.reading.wants, ours, theirs)
            least, most = least or is_least, most or is_most
        else:
            found.left_out.append(f"seed {seed}: {ours.value:g} against {theirs.value:g} makes no {_kind(case)}")
    resolution = _resolution(results.measured(side[0]), case.is_ratio, [*found.side, *found.other])
    return replace(found, resolution=resolution, is_least=least, is_most=most)


def one_sided(values: Sequence[float], needed: float, resolution: float) -> tuple[float, float]:
    """p that the mean is not above ``needed``, and p that it is not below; NaN of fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) <= resolution:
        beyond, signs = float(np.mean(values)) - needed, 2.0 ** -len(values)
        if abs(beyond) <= resolution:
            return 1.0, 1.0
        return (signs, 1.0) if beyond > 0 else (1.0, signs)
    above, below = (stats.ttest_1samp(values, needed, alternative=way).pvalue for way in ("greater", "less"))
    return float(above), float(below)


def described(metric: Metric, case: Case, notes: Sequence[str] = ()) -> str:
    """What was measured, for people, with what must be known of it."""
    what = case.what or (f"{metric.label}, {metric.unit}" if metric.unit else metric.label)
    return f"{what} ({'; '.join(notes)})" if any(notes) else what


def _row(case: Case, side: str, results: Results) -> Row:
    mine, theirs = (case.reading, side), (case.against, case.against_side)
    found, metric = pairs(case, mine, theirs, results), results.measured(case.reading)
    p_yes, p_no = _tested(case, found, metric)
    low, high = paired_tests.mean_interval(found.effects)
    value_low, value_high = paired_tests.mean_interval(found.side)
    other_low, other_high = paired_tests.mean_interval(found.other)
    return Row(
        case=case.name,
        when=case.when,
        side=side,
        against=case.against_side,
        what=described(metric, case, _notes(results, HELP, found, mine, theirs)),
        unit=metric.unit,
        n=len(found.effects),
        value=_mean(found.side),
        value_low=value_low,
        value_high=value_high,
        other=_mean(found.other),
        other_low=other_low,
        other_high=other_high,
        is_ratio=case.is_ratio,
        effect=_unscaled(case, _mean(found.effects)),
        low=_unscaled(case, low),
        high=_unscaled(case, high),
        needed=case.at_least,
        p_yes=p_yes,
        p_no=p_no,
        says="" if case.counts else MEASURED,
        at_most=case.at_most,
        planned=results.planned(mine, theirs),
    )


def _tested(case: Case, found: Pairs, metric: Metric) -> tuple[float, float]:
    """p of "yes" and of "no", uncorrected; NaN where there are too few pairs, or bounds that do not allow it."""
    yes, no = one_sided(found.effects, _scaled(case, case.at_least), found.resolution)
    if case.at_most is not None:
        above, below = one_sided(found.side, case.at_most, metrics.resolution(metric, found.side))
        yes, no = max(yes, below), min(1.0, 2 * min(no, above))
    return math.nan if found.is_most else yes, math.nan if found.is_least else no


def _versus(case: Case, results: Results) -> Versus:
    mine, theirs = (case.reading, SYNC), (case.reading, LOCAL)
    found, metric = pairs(case, mine, theirs, results), results.measured(case.reading)
    matters = case.at_least if case.is_ratio or metric.unit != "%" else min(case.at_least, metrics.MARGIN_POINTS)
    tested = paired_tests.effect(found.effects, [0.0] * len(found.effects), _scaled(case, matters), found.resolution)
    is_bound = found.is_most if tested.difference > 0 else found.is_least
    return Versus(
        case=case.name,
        when=case.when,
        what=described(metric, case, _notes(results, SHARE, found, mine, theirs)),
        unit=metric.unit,
        n=tested.n,
        value=_mean(found.side),
        other=_mean(found.other),
        is_ratio=case.is_ratio,
        effect=_unscaled(case, tested.difference),
        low=_unscaled(case, tested.low),
        high=_unscaled(case, tested.high),
        p=math.nan if is_bound else tested.p,
        word="",
        needed=matters,
        p_same=math.nan if found.is_least or found.is_most else tested.p_tost,
    )


def _worded(one: Versus, p: float, p_same: float) -> Versus:
    """With p values that are corrected, and what they say."""
    word = NOT_RUN if one.n < 2 else SAME if p_same < ALPHA else UNDECIDED
    if p < ALPHA:
        word = BETTER if one.effect > (1 if one.is_ratio else 0) else WORSE
    return replace(one, p=p, p_same=p_same, word=word, is_small=p < ALPHA and p_same < ALPHA)


def _corrected(ps: Sequence[float]) -> list[float]:
    """By Holm, of all of them: what could not be tested (NaN) counts as 1 for the others, and stays."""
    corrected = paired_tests.holm([p if math.isfinite(p) else 1.0 for p in ps])
    return [new if math.isfinite(p) else math.nan for p, new in zip(ps, corrected, strict=True)]


def _notes(
    results: Results, forbidden: Mapping[tuple[bool, bool], str], found: Pairs, *read: tuple[Reading, str]
) -> list[str]:
    """On numbers that are bounds, and on what these do not allow to be shown."""
    beyond = dict.fromkeys(results.beyond(reading, side) for reading, side in read)
    return [*filter(None, [*beyond, forbidden[found.is_least, found.is_most]])]


def _effect(case: Case, ours: float, theirs: float) -> float:
    """NaN where there is none."""
    sign = -1 if case.reading.wants == "lower" else 1
    if not case.is_ratio:
        return sign * (ours - theirs)
    if not (0 < ours < math.inf and 0 < theirs < math.inf):
        return math.nan
    return sign * (math.log(ours) - math.log(theirs))


def _kind(case: Case) -> str:
    return "ratio" if case.is_ratio else "difference"


def _scaled(case: Case, effect: float) -> float:
    return math.log(effect) if case.is_ratio else effect


def _unscaled(case: Case, effect: float) -> float:
    return exp(effect) if case.is_ratio else effect


def _resolution(metric: Metric, is_ratio: bool, values: Sequence[float]) -> float:
    """Metrics are single precision numbers: an accuracy to a millionth of 1, others to a millionth of themselves."""
    if not is_ratio or not values:
        return metrics.resolution(metric, values)
    return metrics.resolution(metric, [1.0]) / (min(values) if metric.unit == "%" else 1.0)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
