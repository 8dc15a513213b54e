"""Handwritten comparisons for tests of reports. Their figures are not computed from runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.runs.metric import Metric

NAN = float("nan")
ERROR = Metric("test/acc", "test error", "%", "lower", "points", 0.0, 100.0)
PROCESSES, ONE = "2 processes on the CPU", "1 process for 2 devices"
COLUMNS = {
    "runs": "path side condition seed status how value seconds used why",
    "means": "condition at side how n mean sd low high",
    "effects": "condition at side how n difference low high p p_holm p_wilcoxon p_tost margin differences verdict",
    "curves": "condition side how seed epoch metric value",
    "cost": "condition side how n seconds_per_step images_per_second pairs ratio ratio_low ratio_high collectives",
    "layers": "layer side condition device_batch effective_batch spread variance_ratio needs",
    "confirmations": "condition side seed one_process processes difference",
    "expected": "condition what published ours agrees source",
}


def frame(name: str, rows: Any = ()) -> pd.DataFrame:
    return pd.DataFrame([tuple(row) for row in rows], columns=COLUMNS[name].split())


def comparison(**changes: Any) -> Comparison:
    """An empty comparison with the given fields."""
    nothing = Comparison(
        title="A comparison",
        question="",
        factor="norm",
        metric=ERROR,
        baseline="local",
        sides=["local", "sync"],
        conditions=[""],
        axis="",
        margin=0.75,
        alpha=0.01,
        suggestion="",
        **{name: frame(name) for name in COLUMNS},
    )
    return replace(nothing, **changes)


def measured(values: dict[tuple[str, str, str], list[float]], *, axis: str = "", **changes: Any) -> Comparison:
    """From the metric by condition, side and how: a value a seed, NaN where a run failed."""
    conditions = list(dict.fromkeys(key[0] for key in values))
    sides = list(dict.fromkeys(key[1] for key in values))
    runs, means, effects = [], [], []
    for (condition, side, how), of_one in values.items():
        at = float(condition.rpartition("=")[2]) if axis else NAN
        base = values[condition, sides[0], how]
        for seed, value in enumerate(of_one):
            fine = not np.isnan(value)
            others = [values[condition, other, how] for other in sides if (condition, other, how) in values]
            partners = [other for other in others if other is not of_one and not np.isnan(other[seed])]
            used = fine and not np.isnan(base[seed]) and bool(partners)
            why = "" if used else "its partner failed" if fine else "it failed"
            path = f"sweep/{len(runs)}"
            status = "finished" if fine else "failed"
            runs.append((path, side, condition, seed, status, how, value, 12.3 + seed, used, why))
        in_pairs = [row[6] for row in runs if row[1:3] == (side, condition) and row[5] == how and row[8]]
        there = np.array(in_pairs)
        n, sd = len(there), float(there.std(ddof=1)) if len(there) > 1 else NAN
        half = float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5 if n > 1 else NAN
        mean = float(there.mean()) if n else NAN
        means.append((condition, at, side, how, n, mean, sd, mean - half, mean + half))
        if side != sides[0]:
            pairs = np.array(of_one) - np.array(base)
            pairs = pairs[~np.isnan(pairs)]
            effects.append((condition, at, side, how, *effect(pairs)))
    return comparison(
        sides=sides,
        baseline=sides[0],
        conditions=conditions,
        axis=axis,
        runs=frame("runs", runs),
        means=frame("means", means),
        effects=frame("effects", effects),
        **changes,
    )


def effect(pairs: np.ndarray, margin: float = 0.75, alpha: float = 0.01) -> tuple[Any, ...]:
    """From ``n`` on; Holm's correction is taken for that of two rows."""
    if len(pairs) < 2:
        mean = float(pairs.mean()) if len(pairs) else NAN
        return (len(pairs), mean, *[NAN] * 6, margin, tuple(pairs), "too few pairs")
    if pairs.any():
        test = stats.ttest_1samp(pairs, 0)
        low, high = test.confidence_interval(0.95)
        p, wilcoxon = float(test.pvalue), float(stats.wilcoxon(pairs).pvalue)
        above = stats.ttest_1samp(pairs, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(pairs, margin, alternative="less").pvalue
        equal = float(max(above, below))
    else:
        low, high, p, wilcoxon, equal = 0.0, 0.0, 1.0, 1.0, 2.0 ** -len(pairs)
    holm, equal = min(1.0, 2 * p), min(1.0, 2 * equal)
    decided = "lower" if pairs.mean() < 0 else "higher"
    verdict = decided if holm < alpha else "no difference" if equal < alpha else "undecided"
    figures = (float(pairs.mean()), float(low), float(high), p, holm, wilcoxon, equal)
    return (len(pairs), *figures, margin, tuple(map(float, pairs)), verdict)


def rich() -> Comparison:
    """A comparison with all features: four batch sizes, three sides, two ways of running, failed runs."""
    draw = np.random.default_rng(0)
    typical = {"local": (68.0, 5.6, 2.5, 2.1), "sync": (6.2, 2.5, 2.2, 2.0), "group_norm": (3.2, 3.1, 3.6, 3.2)}
    values = {
        (f"data.batch_size={batch}", side, ONE): list(np.round(draw.normal(errors[at], errors[at] / 9, 8), 3))
        for at, batch in enumerate((2, 4, 8, 16))
        for side, errors in typical.items()
    }
    values["data.batch_size=4", "sync", ONE][3] = NAN
    for side in ("local", "sync"):
        values["data.batch_size=4", side, PROCESSES] = values["data.batch_size=4", side, ONE][:3]
    values = {key: values[key] for key in sorted(values, key=lambda key: int(key[0].partition("=")[2]))}
    curves = [
        (condition, side, how, seed, epoch, metric, min(90.0, value * scale * (1 + 6 * 0.55**epoch)))
        for (condition, side, how), of_one in values.items()
        for seed, value in enumerate(of_one)
        if not np.isnan(value)
        for epoch in range(1, 11)
        for metric, scale in (("val/error", 0.9), ("train/loss", 0.03))
    ]
    cost = [
        ("data.batch_size=4", "local", PROCESSES, 3, 0.0046, 1739.1, 3, 1.0, 1.0, 1.0, 0.081),
        ("data.batch_size=4", "sync", PROCESSES, 3, 0.0098, 816.3, 3, 2.13, 1.94, 2.41, 0.527),
    ]
    layers = [
        ("net.5", "local", "data.batch_size=2", 2, 1.9, 1.08, 0.512, True),
        ("net.2", "local", "data.batch_size=2", 2, 2.1, 0.97, 0.498, True),
        ("stem.bn", "local", "data.batch_size=2", 128, 11.4, 11.2, 0.871, True),
        ("net.5", "local", "data.batch_size=16", 16, 15.1, 1.06, 0.934, False),
        ("stem.bn", "local", "data.batch_size=16", 1024, 96.3, 10.6, 0.981, False),
    ]
    confirmations = [
        ("data.batch_size=4", side, seed, value, value, 0.0)
        for side in ("local", "sync")
        for seed, value in enumerate(values["data.batch_size=4", side, PROCESSES])
        if not np.isnan(value)
    ]
    minus, over = "error, local minus sync", "ResNet-50, 2 images a GPU: group norm over batch norm"
    prototype = "P1, a prototype of this study"
    expected = [
        ("data.batch_size=2", minus, "+57 ± 8 points", "+61.80 points", "yes", prototype),
        ("data.batch_size=4", minus, "+20.4 points", "+3.10 points", "no", "P1"),
        ("", over, "10.6 points", "—", "not comparable", "Wu & He 2018, abstract"),
    ]
    return measured(
        values,
        axis="data.batch_size",
        title="Small batches: per-device and synchronized statistics",
        question="Does it pay to share batch norm's statistics between two devices, when each has few samples?",
        curves=frame("curves", curves),
        cost=frame("cost", cost),
        layers=frame("layers", layers),
        suggestion="norm.only='[\"net.*\"]': at 2 samples a device these layers see fewer than 16 independent samples.",
        confirmations=frame("confirmations", confirmations),
        expected=frame("expected", expected),
        differs=["norm.name: local / sync / group_norm"],
        constant=["model: mlp, 4 hidden layers of 64", "trainer.max_epochs: 10", "optimizer: sgd, lr 0.05"],
        problems=["sweep/15 (sync, data.batch_size=4, seed 3) failed: its partners are left out of the pairs."],
        command="python train.py +study=small_batch",
    )


def nothing_differs() -> Comparison:
    """The same figures on both sides."""
    same = [2.1, 2.4, 1.9, 2.2, 2.0, 2.3, 2.6, 1.8]
    return measured(
        {("data.batch_size=8", side, PROCESSES): list(same) for side in ("local", "sync")},
        axis="data.batch_size",
    )


def without_axis() -> Comparison:
    """One condition with an empty label."""
    return measured(
        {("", "local", PROCESSES): [41.2, 40.3, 42.9], ("", "sync", PROCESSES): [3.1, 2.8, 3.4]},
    )


def nasty() -> Comparison:
    """Labels that contain markup, missing values, and failed runs."""
    sides = ["_local $x$ <b>&|", 'sync ["*layer3*"] `y`']
    conditions = ["<script>alert(1)</script>", "a|b\\*c*_d_ 日本"]
    values = {
        (condition, side, PROCESSES): [2.0 + at, NAN, 2.5 * (at + 1)]
        for condition in conditions
        for at, side in enumerate(sides)
    }
    values[conditions[1], sides[1], PROCESSES] = [NAN, NAN, NAN]
    made = measured(
        values,
        title="<i>x</i> & [y](z)",
        question="Is 1 < 2 & 3 > 2?",
        differs=["model: <a href='http://example.invalid/x'>x</a> / ![z](http://example.invalid/y.png)"],
        problems=["# not a heading", "<img src=http://example.invalid/z.png onerror=alert(1)>"],
        command="python train.py 'norm.only=[\"*a*\"]' && echo '```'",
        suggestion="</style><script>alert(2)</script>",
    )
    damaged = ("sweep/12", None, None, NAN, "no result", "", NAN, NAN, False, "result.json cannot be read")
    cost = ("", sides[1], PROCESSES, 1, NAN, NAN, 0, NAN, NAN, NAN, NAN)
    runs = frame("runs", [*made.runs.itertuples(index=False), damaged])
    return replace(made, runs=runs.astype({"seed": "Int64"}), cost=frame("cost", [cost]))


ALL = {
    "rich": rich,
    "nothing differs": nothing_differs,
    "without axis": without_axis,
    "nasty": nasty,
    "nothing at all": comparison,
}
