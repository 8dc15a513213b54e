"""What came of a claim: tables that its page is made from, each figure computed from run directories."""

import math
from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Row:
    """One question to one norm: does it do better than the baseline, by what the rule asks for?

    Attributes:
        case: the question's name in the study's file.
        when: the words for it in a verdict, "with sigmoid".
        side: the norm, ``sync`` say.
        against: the side that it is held against.
        what: what was measured, for people: "test error, %".
        unit: of values: "%" or "".
        n: pairs of seeds.
        value: mean of the side over pairs; NaN if there is no pair, as all numbers below.
        value_low: lower end of its 95 % interval.
        value_high: upper end.
        other: mean of the side that it is held against.
        other_low: lower end of its 95 % interval.
        other_high: upper end.
        is_ratio: the effect is a ratio of the two ("times"; geometric mean), else a difference.
        effect: how much better, positive (a ratio: above 1) where it is better in the sense of the claim.
        low: lower end of its 95 % interval.
        high: upper end.
        needed: the least effect that counts, by the rule.
        p_yes: one-sided, that the effect is no larger than needed; of all rows of the claim, by Holm.
        p_no: one-sided, that it is no smaller; likewise.
        says: "yes", "no" or "open"; "measured" where the case is not judged, and the p values are of no family.
        at_most: what the side's own number may be for a "yes", as well; None where nothing is asked of it.
        planned: pairs that there were to be.
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


@dataclass(frozen=True)
class Versus:
    """Synchronized against per-device statistics in one case; numbers are as in :class:`Row`.

    Attributes:
        case: as there.
        when: as there.
        what: as there.
        unit: as there.
        n: pairs.
        value: mean of ``sync``.
        other: mean of ``local``.
        is_ratio: as there.
        effect: how much better ``sync`` is; negative (a ratio: below 1) where it is worse.
        low: lower end of its 95 % interval.
        high: upper end.
        p: two-sided, that there is no difference; of all cases of the claim, by Holm.
        word: "better", "worse", "no difference" (shown to be less than ``needed``, either way), "not decided", or "not
            run" of fewer than two pairs.
        needed: the least effect that counts, as in :class:`Row`, but of errors in percent no more than 0.75 points.
        p_same: that the effect is ``needed`` or more, either way (two one-sided tests); of all cases, by Holm.
        is_small: "better" or "worse", and shown to be by less than is needed.
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


@dataclass(frozen=True)
class Published:
    """A figure of the literature beside ours.

    Attributes:
        what: it is a figure of.
        published: as it was published.
        source: where; and how it came to be known, if not from there.
        ours: the same of our runs, with its 95 % interval, or "not measured".
        agrees: "yes" (our mean is within the tolerance), "no" (all of our interval is outside of it), "open", or ""
            where the two are of different things and only to be seen side by side.
    """

    what: str
    published: str
    source: str
    ours: str
    agrees: str


@dataclass(frozen=True)
class PlotData:
    """One plot, as numbers.

    Attributes:
        name: for files: letters, digits and dashes.
        title: a sentence about what is seen.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        x_log: whether it is logarithmic.
        y_log: likewise.
        frame: ``panel`` ("" where there is one alone), ``side``, ``series`` ("" or what the line is of: "running
            statistics"), ``x`` (a number, or a word where conditions are no numbers), ``n``, ``mean``, ``low``,
            ``high`` (95 % interval; NaN for one seed).
        level: a horizontal line to see, or None.
        level_label: what it is.
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


@dataclass(frozen=True)
class Finding:
    """A claim, the rule, and what the runs say.

    Attributes:
        study: the name of the study.
        number: of the claim.
        text: the claim in a few words: "Faster convergence".
        article: what is claimed, in a sentence.
        method: how it was put to the test, in a sentence or two.
        baseline: the side that norms are held against.
        sides: the norms, in order.
        seeds: how many there were to be.
        alpha: level of the tests.
        rows: every case for every side that it is about.
        verdicts: by side: "holds", "holds only WHEN", "does not hold", "not decided by N seeds", and what is to be
            said besides.
        sharing: what synchronized statistics do against per-device ones, over the cases that are judged, in a few
            words: "better WHEN; worse WHEN", "no difference", "not decided"; "" where no case has both.
        versus: synchronized against per-device statistics, case by case.
        worse: sentences on where synchronized statistics do worse than per-device ones; empty where they do not.
        better: likewise, where they do better.
        published: figures of the literature.
        plots: at least one.
        runs: how many there were to be.
        finished: how many of them have a result.
        diverged: how many of those stopped at a loss that was not finite; they count with the error that they have.
        problems: failed and missing runs, and whatever else a reader must know, a line each.
        command: what makes the runs and this page again.
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
