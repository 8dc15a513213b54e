"""The result of comparing runs: tables of figures computed from run directories, from which every report is made."""

from dataclasses import dataclass, field

import pandas as pd

from syncbn.study.compare.runs.metric import Metric


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in one factor, side by side.

    A *side* is a value of the factor ("local", "sync over world"). A *condition* is a combination of all other settings
    except the seed ("data.batch_size=2"; "" if they never vary). Two runs of different sides with the same condition
    and seed are a *pair*. All frames have a plain RangeIndex. A frame without rows still has its columns.

    Attributes:
        title: of the page.
        question: the question that the comparison answers, in one or two sentences; "" if none is given.
        factor: the compared setting, for example "norm".
        metric: the metric by which the sides are compared.
        baseline: the side with which the others are compared.
        sides: labels of the sides, the baseline first.
        conditions: labels of the conditions, in order.
        axis: the only setting that varies between conditions, if it is numeric ("data.batch_size"); else "".
        margin: the equivalence margin, half the width of "no difference", in the metric's unit. NaN if each condition
            has its own margin, 5 % of the baseline's mean.
        alpha: level of the tests. Confidence intervals are 95 % for every alpha.
        runs: every run directory that was read, including failed runs. ``path`` (relative), ``side``, ``condition``,
            ``seed``, ``status`` (see :class:`syncbn.study.compare.runs.run_reader.Run`), ``how`` ("2 processes on the
            CPU", "1 process for 2 devices"), ``value`` (the metric as shown; NaN if none), ``seconds`` (of training),
            ``used`` (bool: whether the run is in a pair), ``why`` (the reason why it is not, else "").
        means: ``condition``, ``at`` (value of the axis, NaN without an axis), ``side``, ``how``, ``n``, ``mean``,
            ``sd`` (NaN for n = 1), ``low``, ``high`` (95 % t interval of the mean).
        effects: paired differences, side minus baseline: ``condition``, ``at``, ``side``, ``how``, ``n`` (pairs),
            ``difference``, ``low``, ``high`` (95 % t interval), ``p`` (two-sided paired t test), ``p_holm`` (``p``
            after Holm's 1979 correction for all rows), ``p_wilcoxon``, ``p_tost`` (equivalence within the margin, also
            Holm-corrected for all rows), ``margin`` (of the row), ``differences`` (tuple of floats, by seed),
            ``verdict`` ("lower", "higher", "no difference", "undecided", "too few pairs"). A row can be "lower" or
            "higher" and have ``p_tost`` below alpha: the difference exists and is within the margin.
        curves: ``condition``, ``side``, ``how``, ``seed``, ``epoch`` (1 is the first), ``metric`` ("train/loss",
            "val/error" in %), ``value``.
        cost: ``condition``, ``side``, ``how``, ``n``, ``seconds_per_step``, ``images_per_second``, ``pairs``
            (number of seeds in the ratio), ``ratio`` (seconds per step divided by the baseline's with the same seed,
            condition and how; geometric mean), ``ratio_low``, ``ratio_high`` (minimum and maximum over seeds),
            ``collectives`` (fraction of the time in collectives, 0 to 1; NaN if it was not monitored). Only runs with
            one process per device: a run that simulates several devices in one process does not measure cost.
        layers: which layers need shared statistics, in order of need: ``layer``, ``side``, ``condition``,
            ``device_batch`` (values per channel on a device), ``effective_batch`` (number of independent samples to
            which a device's statistics correspond, at most ``device_batch``), ``spread`` (of the devices' means, as a
            multiple of the spread expected by chance; 1 is chance), ``variance_ratio`` (a device's variance divided by
            the shared variance), ``needs`` (bool).
        suggestion: a sentence with a setting that synchronizes the layers in need, and the reason; "" if no run was
            monitored.
        confirmations: runs that were made both in one process and with one process per device: ``condition``,
            ``side``, ``seed``, ``one_process``, ``processes`` (values of the metric), ``difference``.
        expected: published or expected figures beside ours: ``condition``, ``what``, ``published`` (text; ± is our
            tolerance), ``ours`` (text), ``agrees`` ("yes", "no", "not comparable"), ``source``.
        differs: one line for each setting that differs between the sides ("norm.name: local / sync").
        constant: one line for each group of settings that all runs share.
        problems: one line for each failed run, missing pair, or other reason for doubt.
        command: the command that reproduces this page.
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
    command: str = ""
