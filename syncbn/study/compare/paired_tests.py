"""Statistics of paired runs: mean difference, confidence interval, tests for a difference and for equivalence.

The tests use the difference of each pair. The seed's influence on both sides (weights, order of the data, split)
cancels in it. There are three tests:

- the paired t test (Student 1908);
- the signed-rank test (Wilcoxon 1945), which does not assume a normal distribution;
- for equivalence, two one-sided t tests within a margin (TOST; Schuirmann 1987).

The t test and TOST use the same level, alpha, and Holm's (1979) correction for several tests. "No difference" is as
strong a claim as a difference, so it has to be shown too. If neither is shown, the verdict is "undecided". This is
stricter than the usual 5 % for TOST.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of confidence intervals


@dataclass(frozen=True)
class Effect:
    """Paired differences, side minus baseline, and their tests. A number is NaN if there are too few pairs for it.

    Attributes:
        n: number of pairs.
        difference: mean of the differences.
        low, high: ends of the 95 % t interval.
        p: of the two-sided paired t test.
        p_wilcoxon: of the two-sided signed-rank test.
        p_tost: of the equivalence test, whose null hypothesis is a difference outside the margin.
        differences: one for each pair.
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
    """Computes the paired differences of two sides and tests them.

    If all differences are equal, the t test is undefined: their standard deviation is 0. Then p is that of the sign
    test, 2 * 2^-n (the exact permutation test of paired data; Fisher 1935), or 1 if the differences are 0. Likewise p
    of the equivalence test is 2^-n if the common difference is within the margin, 0 included. At a level of 0.01, 7
    pairs show equivalence and two do not.

    Args:
        side: values of the side, one for each pair. Pairs with a value that is not finite are dropped.
        baseline: values of the baseline, in the same order.
        margin: the equivalence margin, half the width of "no difference".
        resolution: differences that vary by no more than this count as equal.
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
    """The 95 % t interval of the mean; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values after Holm's (1979) step-down correction. NaN stays NaN and does not count as a test."""
    order = sorted((p, place) for place, p in enumerate(ps) if math.isfinite(p))
    corrected, least = [math.nan] * len(ps), 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[place] = least
    return corrected


def decide(effect: Effect, p_holm: float, p_tost: float, alpha: float) -> str:
    """``lower`` or ``higher`` than the baseline, ``no difference``, ``undecided``, or ``too few pairs``.

    The p values of the t test and of the equivalence test are corrected for the number of tests.
    """
    if effect.n < 2:
        return "too few pairs"
    if p_holm < alpha:
        return "lower" if effect.difference < 0 else "higher"
    return "no difference" if is_within(p_tost, alpha) else "undecided"


def is_within(p_tost: float, alpha: float) -> bool:
    """Whether the difference is shown to be within the margin. This can hold for ``lower`` and ``higher`` too."""
    return p_tost < alpha


def _wilcoxon(d: np.ndarray, resolution: float) -> float:
    """p of the signed-rank test. Differences are rounded to the resolution, so that nearly equal ones count as ties."""
    if resolution > 0:
        d = np.round(d / resolution) * resolution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scipy < 1.13 warns about the normal approximation
        return float(stats.wilcoxon(d).pvalue)
