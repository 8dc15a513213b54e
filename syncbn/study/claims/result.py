"""The results of a claim: the answers, figures and plot data from which its page is made."""

import math
from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Row:
    """The answer for one case and one norm: is it better than the compared side by the required effect?

    Attributes:
        case: name of the case in the study's file.
        when: the case in words, for the verdict: "with sigmoid".
        side: the norm, for example ``sync``.
        against: the side with which the norm is compared.
        what: the measured quantity, for display: "test error, %".
        unit: of the values: "%" or "".
        n: number of pairs, one for each seed.
        value: mean of the norm over pairs. This and all numbers below are NaN if there is no pair.
        value_low, value_high: ends of its 95 % interval.
        other: mean of the compared side.
        other_low, other_high: ends of its 95 % interval.
        is_ratio: whether the effect is a ratio ("times"; geometric mean); otherwise it is a difference.
        effect: improvement of the norm; positive (for a ratio: above 1) if the norm is better in the claim's sense.
        low, high: ends of its 95 % interval.
        needed: the effect that the rule requires.
        p_yes: of the one-sided test that the effect is above ``needed``, Holm-corrected for all rows of the claim.
        p_no: of the one-sided test that the effect is below ``needed``, likewise.
        says: "yes", "no" or "open". "measured" if the case does not count for the verdict; its p values are then
            uncorrected.
        at_most: additional upper limit of the norm's own number for a "yes"; None for no limit.
        planned: number of pairs that the study plans.
        note: on numbers that are bounds, or that omit conditions; "" for none.
    """

    case: str
    when: str
    side: str
    against: str
    what: str
    unit: str
    n: int
    value: float
    value_low: float
    value_high: float
    other: float
    other_low: float
    other_high: float
    is_ratio: bool
    effect: float
    low: float
    high: float
    needed: float
    p_yes: float
    p_no: float
    says: str
    at_most: float | None = None
    planned: int = 0
    note: str = ""


@dataclass(frozen=True)
class Versus:
    """Synchronized compared with per-device statistics in one case.

    Attributes:
        case, when, what, unit, is_ratio, note: as in :class:`Row`.
        n: number of pairs.
        value, other: means of ``sync`` and of ``local``.
        effect: improvement of ``sync`` over ``local``; negative (for a ratio: below 1) if ``sync`` is worse.
        low, high: ends of its 95 % interval.
        p: of the two-sided test for a difference, Holm-corrected for all cases of the claim.
        word: "better", "worse", "no difference" (the effect is shown to be smaller than ``needed`` in either
            direction), "not decided", or "not run" (fewer than two pairs).
        needed: the required effect as in :class:`Row`, but at most 0.75 points for errors in percent.
        p_same: of the equivalence test with the margin ``needed`` (two one-sided tests), Holm-corrected likewise.
        is_small: whether ``sync`` is "better" or "worse", and by less than ``needed``; both are shown.
    """

    case: str
    when: str
    what: str
    unit: str
    n: int
    value: float
    other: float
    is_ratio: bool
    effect: float
    low: float
    high: float
    p: float
    word: str
    needed: float = math.nan
    p_same: float = math.nan
    is_small: bool = False
    note: str = ""


@dataclass(frozen=True)
class CaseLabel:
    """What a page needs of a case besides its numbers.

    Attributes:
        short: the condition in at most four words, for the first matrix: "with sigmoid"; "" for none.
        least, most: the limits of the measured quantity, 0 and 100 for an error in percent; None for no limit.
    """

    short: str = ""
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Published:
    """A published figure beside ours.

    Attributes:
        what: the quantity.
        published: the published figure.
        source: the publication; if the figure was not read there, also where it was read.
        ours: our figure with its 95 % interval, or "not measured".
        agrees: "yes" (our mean is within the tolerance), "no" (our whole interval is outside of it), "open", or "" if
            the two are different quantities that are only shown side by side.
    """

    what: str
    published: str
    source: str
    ours: str
    agrees: str


@dataclass(frozen=True)
class PlotData:
    """The numbers and labels of one plot.

    Attributes:
        name: for file names: letters, digits and dashes.
        title: a sentence that describes the plot.
        x, y: labels of the axes.
        x_log, y_log: whether the axes are logarithmic.
        frame: ``panel`` ("" if there is only one), ``side``, ``series`` (the name of the line, "running statistics", or
            ""), ``x`` (a number, or a string if the conditions are not numbers), ``n``, ``mean``, ``low``, ``high``
            (95 % interval; NaN for one seed).
        level: the value at which a reference line is drawn, or None.
        level_label: label of the reference line.
        least, most: the limits of the quantity, at which drawn intervals end; None for no limit.
    """

    name: str
    title: str
    x: str
    y: str
    x_log: bool
    y_log: bool
    frame: pd.DataFrame
    level: float | None = None
    level_label: str = ""
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Finding:
    """A claim with its verdicts and the results behind them.

    Attributes:
        study: the name of the study.
        number: of the claim.
        text: the claim in a few words: "Faster convergence".
        article: the claim of the article, in a sentence.
        method: how the claim is tested, in one or two sentences.
        baseline: the side with which norms are compared by default.
        sides: the norms, in order.
        seeds: number of planned seeds.
        alpha: level of the tests.
        rows: one row for each case and each of its sides.
        verdicts: by side: "holds", "holds only WHEN", "does not hold" or "not decided by N seeds", with additions for
            cases that are undecided or not run.
        sharing: synchronized compared with per-device statistics over the cases that count, in a few words: "better
            WHEN; worse WHEN", "no difference" or "not decided"; "" if no case has both.
        versus: synchronized compared with per-device statistics, one entry for each case.
        worse: one sentence for each case in which synchronized statistics are worse than per-device statistics.
        better: likewise, for each case in which they are better.
        published: published figures beside ours.
        plots: at least one.
        runs: number of planned runs.
        finished: number of runs with a result.
        diverged: number of finished runs that stopped because of a non-finite loss. They count with their error.
        problems: one line for each failed run, missing run, or other reason for doubt.
        command: the command that repeats the runs and writes this page.
        source: who made the claim; "" if this is not known.
        labels: by case.
        left_out: one line for each case whose runs the budget leaves out.
    """

    study: str
    number: int
    text: str
    article: str
    method: str
    baseline: str
    sides: list[str]
    seeds: int
    alpha: float
    rows: list[Row]
    verdicts: dict[str, str]
    versus: list[Versus]
    worse: list[str]
    published: list[Published]
    plots: list[PlotData]
    runs: int
    finished: int
    diverged: int
    better: list[str] = field(default_factory=list)
    sharing: str = ""
    problems: list[str] = field(default_factory=list)
    command: str = ""
    source: str = ""
    labels: dict[str, CaseLabel] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
