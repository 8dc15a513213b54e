"""The statistics of pairs: the difference, an interval, and tests that say "differs", "does not", or neither.

Differences are taken pair by pair, so what a seed does to both sides (weights, order of the data, split) falls out. The
tests are the paired t test (Student 1908), the signed-rank test (Wilcoxon 1945) beside it, which asks for no normal
distribution, and for equivalence two one-sided t tests within a margin (TOST; Schuirmann 1987). *One* level, alpha,
holds for both claims, and of many tests Holm's (1979) correction: "no difference" is as strong a claim as a difference,
and has to be shown as well; what shows neither is undecided. That is stricter than the 5 % that is usual for TOST.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of intervals


@dataclass(frozen=True)
class Effect:
    """A side minus the baseline, over pairs. Numbers are NaN where there are too few pairs for them.

    Attributes:
        n: pairs.
        difference: their mean.
        low: lower end of the 95 % interval, by t.
        high: upper end.
        p: of the paired t test, two-sided.
        p_wilcoxon: of the signed-rank test, two-sided.
        p_tost: that the difference lies outside of the margin.
        differences: each pair's.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    p_tost: float
    differences: tuple[float, ...]


def effect(side: Sequence[float], baseline: Sequence[float], margin: float, resolution: float = 0.0) -> Effect:
    """Compares two sides, value by value.

    Where all differences are one and the same number there is no spread for a t test to measure by. Then p is that of
    the signs, 2 * 2^-n (the exact permutation test of paired data; Fisher 1935), or 1 if the number is 0. Likewise p of
    the equivalence test is 2^-n if the number, be it 0, is within the margin: 7 pairs show it at 0.01, two do not.

    Args:
        side: values of one side, by pair; a pair with a value that is not finite is left out.
        baseline: of the other, in the same order.
        margin: half the width of what counts as no difference.
        resolution: what differences may differ by and be the same.
    """
    pairs = np.array([side, baseline], dtype=float).reshape(2, -1)
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    d = pairs[0] - pairs[1]
    n, listed, nan = len(d), tuple(d.tolist()), math.nan
    if n < 2:
        return Effect(n, float(d[0]) if n else nan, nan, nan, nan, nan, nan, listed)
    mean = float(d.mean())
    if np.ptp(d) <= resolution:
        signs = 2.0**-n
        p = 1.0 if abs(mean) <= resolution else 2 * signs
        p_tost = signs if abs(mean) < margin else 1.0
        return Effect(n, mean, mean, mean, p, p, p_tost, listed)
    low, high = mean_interval(d.tolist())
    p = float(stats.ttest_1samp(d, 0.0).pvalue)
    above = float(stats.ttest_1samp(d, -margin, alternative="greater").pvalue)
    below = float(stats.ttest_1samp(d, margin, alternative="less").pvalue)
    return Effect(n, mean, low, high, p, _wilcoxon(d, resolution), max(above, below), listed)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean, by t; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for their number, step by step (Holm 1979); NaN is not counted and stays."""
    order = sorted((p, place) for place, p in enumerate(ps) if math.isfinite(p))
    corrected, least = [math.nan] * len(ps), 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[place] = least
    return corrected


def verdict(effect: Effect, p_holm: float, p_tost: float, alpha: float) -> str:
    """``lower`` or ``higher`` than the baseline, ``no difference``, ``undecided``, or ``too few pairs``.

    Args:
        effect: of which two tests were made.
        p_holm: of the t test, corrected for the number of tests.
        p_tost: of the equivalence test, corrected likewise.
        alpha: level of both.
    """
    if effect.n < 2:
        return "too few pairs"
    if p_holm < alpha:
        return "lower" if effect.difference < 0 else "higher"
    return "no difference" if is_within(p_tost, alpha) else "undecided"


def is_within(p_tost: float, alpha: float) -> bool:
    """Whether a difference is shown to be within the margin, which one that is ``lower`` or ``higher`` may be too."""
    return p_tost < alpha


def _wilcoxon(d: np.ndarray, resolution: float) -> float:
    """Of differences that are not all the same; those below the resolution are 0, and equal ones are ties."""
    if resolution > 0:
        d = np.round(d / resolution) * resolution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the normal approximation, where ties are few; scipy < 1.13
        return float(stats.wilcoxon(d).pvalue)
