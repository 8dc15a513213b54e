"""What a comparison is: tables that everything shown is made from, each figure computed from run directories."""

from dataclasses import dataclass, field

import pandas as pd

from syncbn.study.compare.runs.metric import Metric


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in one factor, side by side.

    A *side* is a value of the factor ("local", "sync over world"); a *condition* is a combination of all other settings
    but the seed ("data.batch_size=2"; "" where they never vary). Runs of one condition and one seed are a *pair*. All
    frames have a plain RangeIndex, and are empty (with their columns) where there is nothing to say.

    Attributes:
        title: of the page.
        question: what was asked, in a sentence or two; "" if nobody says.
        factor: the setting compared, "norm" say.
        metric: what the sides are compared by.
        baseline: the side that the others are compared with.
        sides: their labels, the baseline first.
        conditions: their labels, in order.
        axis: the setting that tells conditions apart, where it is one alone and a number ("data.batch_size"); else "".
        margin: half the width of what counts as no difference, in the metric's unit; NaN where each condition has its
            own, 5 % of the baseline's mean.
        alpha: level of the tests; intervals cover 95 % whatever it is.
        runs: every run directory that was looked at, failed ones too. ``path`` (relative), ``side``, ``condition``,
            ``seed``, ``status`` ("finished", "failed", "interrupted", "running", "no result"), ``how`` ("2 processes on
            the CPU", "1 process for 2 devices"), ``value`` (the metric as shown; NaN if none), ``seconds`` (of
            training), ``used`` (bool: whether it is in a pair), ``why`` (why not, else "").
        means: ``condition``, ``at`` (the axis's number, NaN without one), ``side``, ``how``, ``n``, ``mean``, ``sd``
            (NaN for n = 1), ``low``, ``high`` (95 % interval of the mean, by t).
        effects: side minus baseline, over paired seeds: ``condition``, ``at``, ``side``, ``how``, ``n`` (pairs),
            ``difference``, ``low``, ``high`` (95 %, by t), ``p`` (paired t, two-sided), ``p_holm`` (of all rows, by
            Holm 1979), ``p_wilcoxon``, ``p_tost`` (equivalence within the margin; of all rows, by Holm too),
            ``margin`` (of the row), ``differences`` (tuple of floats, by seed), ``verdict`` ("lower", "higher", "no
            difference", "undecided", "too few pairs"). Where both tests say so, a row that is "lower" or "higher" is
            shown to be within the margin too.
        curves: ``condition``, ``side``, ``how``, ``seed``, ``epoch`` (1 is the first), ``metric`` ("train/loss",
            "val/error" in %), ``value``.
        cost: ``condition``, ``side``, ``how``, ``n``, ``seconds_per_step``, ``images_per_second``, ``pairs``
            (seeds that the ratio is of), ``ratio`` (seconds per step over the baseline's of the same seed, condition
            and how: geometric mean), ``ratio_low``, ``ratio_high`` (least and greatest over seeds), ``collectives``
            (share of the time, 0 to 1; NaN where no monitor looked). Only of runs whose devices are processes: one
            process for several devices says nothing on cost.
        layers: which layers need shared statistics, neediest first: ``layer``, ``side``, ``condition``,
            ``device_batch`` (values per channel on a device), ``effective_batch`` (independent samples that a device's
            statistics are worth, not more than it has), ``spread`` (of the devices' means, as a multiple of what chance
            gives; 1 is chance), ``variance_ratio`` (a device's variance over the shared one), ``needs`` (bool).
        suggestion: a setting that synchronizes what needs it, and why, in a sentence; "" where nothing was monitored.
        confirmations: settings that ran both in one process and as processes: ``condition``, ``side``, ``seed``,
            ``one_process``, ``processes`` (the metric), ``difference``.
        expected: published or expected figures beside ours: ``condition``, ``what``, ``published`` (text; ± is a
            tolerance of ours), ``ours`` (text), ``agrees`` ("yes", "no", "not comparable"), ``source``.
        differs: what differs between the sides, a line each ("norm.name: local / sync").
        constant: settings that all runs share and that matter to a reader, a line each.
        problems: failed runs, missing pairs, and whatever else a reader must know before believing, a line each.
        verdict: the answer, in a sentence or a few.
        command: what reproduces this page.
    """

    title: str
    question: str
    factor: str
    metric: Metric
    baseline: str
    sides: list[str]
    conditions: list[str]
    axis: str
    margin: float
    alpha: float
    runs: pd.DataFrame
    means: pd.DataFrame
    effects: pd.DataFrame
    curves: pd.DataFrame
    cost: pd.DataFrame
    layers: pd.DataFrame
    suggestion: str
    confirmations: pd.DataFrame
    expected: pd.DataFrame
    differs: list[str] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    verdict: str = ""
    command: str = ""
