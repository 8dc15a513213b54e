"""Handwritten findings for tests of the page on claims. Their figures are not computed from runs."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from syncbn.study.claims.result import CaseLabel, Finding, PlotData, Published, Row, Versus

NAN = float("nan")
NORMS = ("none", "local", "sync", "group_norm")
COLUMNS = ["panel", "side", "series", "x", "n", "mean", "low", "high"]
KINDS = ("gaussian_noise", "shot_noise", "gaussian_blur", "motion_blur", "contrast", "brightness", "translate", "scale")
TITLE, QUESTION = "Nine claims", "Do they hold, with statistics of one device and of all?"
SERIES = ("running statistics", "adapted to the test batch")


def ladder() -> PlotData:
    """Steps by learning rate, both logarithmic."""
    rows = []
    for at, side in enumerate(NORMS):
        for rate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
            steps = 60 * (0.03 / rate) ** 0.8 * (2.2 if side == "none" else 1 + 0.05 * at) + 8
            steps = min(900.0, steps if side != "none" or rate < 0.2 else 900.0)
            rows.append(("", side, "", rate, 8, steps, steps / 1.15, steps * 1.15))
    title = "Steps to 95 % by learning rate"
    return plot("ladder-steps", title, "learning rate", "steps to 95 %", rows, x_log=True, y_log=True)


def severities() -> PlotData:
    """Eight lines in one plot."""
    rows = []
    for at, side in enumerate(NORMS):
        for series in SERIES if side in ("local", "sync") else SERIES[:1]:
            for severity in range(1, 6):
                error = (6 + at) * severity ** (1.1 - 0.1 * at) * (0.45 if series == SERIES[1] else 1.0)
                rows.append(("", side, series, severity, 8, error, error - 1.2, error + 1.2))
    return plot("severity", "Error by severity of the corruption", "severity", "test error, %", rows)


def depths() -> PlotData:
    """Fifty layers in eight panels, from 1e-44 to 1e2."""
    rows = []
    for activation, gain in (("relu", 1.0), ("sigmoid", 1.0), ("tanh", 0.5), ("relu", 0.1)):
        for depth in (20, 50):
            for at, side in enumerate(NORMS):
                rate = {"relu": 1.21, "sigmoid": 1.02, "tanh": 1.1}[activation]
                if side == "none":
                    rate = {"relu": 1.0, "sigmoid": 0.24, "tanh": 0.5}[activation] * (0.15 if gain == 0.1 else 1)
                panel = f"{activation}, gain {gain}, {depth} layers"
                for layer in range(1, depth + 1):
                    norm = 0.01 * (rate + at * 0.005) ** (depth - layer)
                    norm = norm if norm > 1e-44 else 0.0
                    rows.append((panel, side, "", layer, 8, norm, norm / 2, norm * 2))
    return plot("start", "Gradients by depth at the beginning", "layer", "norm of the gradient", rows, y_log=True)


def kinds() -> PlotData:
    """Words, with two series."""
    draw = np.random.default_rng(0)
    rows = [
        ("", side, series, kind, 8, mean := float(draw.uniform(4, 60)), mean - 2.5, mean + 2.5)
        for kind in KINDS
        for side in NORMS
        for series in SERIES
        if side in ("local", "sync") or series == SERIES[0]
    ]
    title, level = "Error by kind of corruption", {"level": 90.0, "level_label": "chance"}
    return plot("kinds", title, "kind of corruption", "test error, %", rows, **level)


def curve() -> PlotData:
    """The batch that statistics are adapted to, by three priors, one of which has no runs at the end."""
    rows = []
    for side, prior, at in product(("local", "sync"), (0, 16, 256), range(10)):
        mean = 20 + 60 / (2**at + prior) ** 0.5 + 3 * (side == "sync")
        rows.append(("", side, f"N = {prior}", 2**at, 8, mean, mean - 2, mean + 2))
    return plot("curve", "Error by the batch adapted to", "images in the batch", "test error, %", rows, x_log=True)


def two_seeds() -> PlotData:
    """Intervals that are far wider than the data, one run alone, and a run that has no number."""
    rows = [
        ("", "local", "", "at the start", 2, 12.0, -40.0, 64.0),
        ("", "sync", "", "at the start", 1, 14.0, NAN, NAN),
    ]
    rows += [("", "none", "", "after a very long training with all the regularization there is", 0, NAN, NAN, NAN)]
    rows += [("", "local", "", "after a very long training with all the regularization there is", 2, 11.0, 10.5, 11.5)]
    return plot("gap", "Gap between test and training", "moment", "gap, points", rows)


def labels() -> PlotData:
    """A few places, nothing among them, on a logarithmic axis."""
    rows = [
        ("", side, "", share, 8, mean := 2 + 40 * share + at, mean - 1, mean + 1)
        for at, side in enumerate(NORMS)
        for share in (0, 0.1, 0.2, 0.4)
    ]
    return plot("labels", "Error by the share of wrong labels", "wrong labels", "test error, %", rows, x_log=True)


def nothing() -> PlotData:
    """No run has finished."""
    return plot("clock", "Seconds to 95 %", "devices", "seconds", [])


def plot(name: str, title: str, x: str, y: str, rows: list[tuple[Any, ...]], **more: Any) -> PlotData:
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return PlotData(name, title, x, y, **{"x_log": False, "y_log": False, "frame": frame, **more})


PLOTS = (ladder, two_seeds, depths, curve, severities, kinds, labels, nothing)


def row(case: str, side: str, says: str, **changes: Any) -> Row:
    """A row with a ratio, by default 2.5 times with a baseline of 100."""
    p_yes, p_no = {"yes": (0.0012, 1.0), "no": (1.0, 3.2e-7)}.get(says, (0.061, 0.72))
    about = {"case": case, "when": f"with {case}" if case else "", "side": side, "against": "none", "planned": 8}
    about |= {"what": "steps to 95 %", "unit": "", "n": 8, "is_ratio": True, "says": says}
    values = {"value": 40.25, "value_low": 38.125, "value_high": 42.5, "p_yes": p_yes, "p_no": p_no}
    others = {"other": 100.5, "other_low": 90.125, "other_high": 110.0625}
    effect = {"effect": 2.5125, "low": 2.2, "high": 2.825, "needed": 1.25}
    return Row(**(about | values | others | effect | changes))


def error(case: str, side: str, says: str, effect: float, **changes: Any) -> Row:
    """A row on an error in percent, with an effect in points."""
    ends = {"value": 17.5, "value_low": 16.25, "value_high": 18.75, "other": 17.5 + effect}
    ends |= {"other_low": 16.0 + effect, "other_high": 19.0 + effect, "effect": effect, "low": effect - 1.5}
    about = {"what": "test error, %", "unit": "%", "is_ratio": False, "needed": 1.0, "high": effect + 1.5}
    return replace(row(case, side, says), **(about | ends | changes))


def versus(case: str, word: str, effect: float, p: float, **changes: Any) -> Versus:
    ends = {"value": 20.7, "other": 20.7 + effect, "is_ratio": False, "effect": effect}
    about = {"case": case, "when": f"with {case}", "what": "test error, %", "unit": "%", "n": 10}
    tested = {"low": effect - 1.2, "high": effect + 1.2, "p": p, "word": word, "needed": 1.0, "p_same": 1.0}
    return Versus(**(about | ends | tested | changes))


def finding(study: str, number: int, text: str, **changes: Any) -> Finding:
    """An empty finding with the given fields."""
    about: dict[str, Any] = {
        "article": f"The article says of batch norm: {text.lower()}.",
        "method": f"Networks are trained with each norm, and {text.lower()} is looked for.",
        "command": f"python train.py +study={study}",
    }
    about |= {"baseline": "none", "sides": ["local", "sync", "group_norm"], "seeds": 8, "alpha": 0.01, "verdicts": {}}
    about |= {name: [] for name in ("rows", "versus", "worse", "published", "plots")}
    about |= dict.fromkeys(("runs", "finished", "diverged"), 0)
    return Finding(study, number, text, **(about | changes))


LONG = "at a learning rate that no network without any normalization has ever been trained with, as far as is known"
WORSE = (
    "With label noise of 40 %, synchronized statistics do worse than per-device ones: test error 20.7 against 17.5 %,"
    " 3.2 points [2.0, 4.4], 10 seeds."
)


SEEDS = "by 8 seeds"
STEPS = "steps, without over with batch norm"


def all_nine() -> list[Finding]:
    """Findings with every verdict, rows without numbers, long words, and words that contain markup."""
    everywhere = dict.fromkeys(("local", "sync", "group_norm"), "holds")
    numbers = ("value", "value_low", "value_high", "other", "other_low", "other_high", "effect", "low", "high")
    no_number = dict.fromkeys(numbers, NAN)
    return [
        finding(
            "convergence",
            1,
            "Faster convergence",
            rows=[row("", side, "yes", when="") for side in ("local", "sync", "group_norm")],
            verdicts=everywhere,
            versus=[
                Versus(
                    *("", "", "steps to 95 %", "", 8, 40.25, 39.5, True, 0.98, 0.91, 1.06, 1.0, "no difference"),
                    needed=1.25,
                    p_same=0.00031,
                )
            ],
            sharing="no difference",
            published=[Published(STEPS, "2.33 times", "Ioffe & Szegedy 2015", "2.51 times", "yes")],
            plots=[ladder()],
            runs=256,
            finished=256,
        ),
        finding(
            "regularization",
            2,
            "Regularization through batch noise",
            rows=[
                error("small batches", "local", "yes", 3.25),
                error("large batches", "local", "no", 0.25),
                error("small batches", "sync", "no", -2.125),
            ],
            labels={"small batches": CaseLabel("with small batches", 0.0, 100.0)},
            source="Ioffe & Szegedy 2015",
            verdicts={"local": f"holds only {LONG}", "sync": "does not hold"},
            versus=[versus("small batches", "worse", -5.375, 2e-5)],
            sharing="worse with small batches",
            worse=["With small batches, synchronized statistics do worse: 5.4 points [4.2, 6.6], 8 seeds."],
            published=[Published("gap", "", "Wu & Johnson 2021", "not measured", "")],
            plots=[two_seeds()],
            runs=6,
            finished=5,
            problems=["regularization/x/y/2 (sync, seed 2) failed."],
        ),
        finding(
            "gradients",
            3,
            "Relief from vanishing and exploding gradients",
            rows=[
                row("sigmoid", "local", "yes", effect=3.4e30, low=2.1e29, high=5e31, needed=10.0),
                row("ReLU", "local", "no", effect=3.4e-7, low=1e-8, high=0.002),
                row("tanh", "local", "open", n=5),
                row("its growth a layer", "local", "measured"),
            ],
            verdicts={
                "local": f"holds only with sigmoid; not decided with tanh {SEEDS}",
                "sync": f"not decided {SEEDS}",
            },
            plots=[depths()],
            runs=96,
            finished=96,
            diverged=12,
        ),
        finding(
            "initialization", 4, "Less dependence on initialization", plots=[nothing()], problems=["no run is there"]
        ),
        finding(
            "learning_rate",
            5,
            "Higher usable learning rates",
            rows=[row("", "local", "open", n=1, p_yes=NAN, p_no=NAN, **no_number)],
            verdicts=dict.fromkeys(everywhere, "not decided by 1 seed"),
        ),
        finding(
            "input_distributions",
            6,
            "Robustness to different input distributions",
            rows=[
                error("running statistics", "local", "no", -12.0),
                error("adapted statistics", "local", "yes", 9.5, at_most=20.0),
            ],
            versus=[
                versus("running statistics", "not decided", 0.5, 0.3, p_same=0.04),
                versus("adapted statistics", "better", 0.25, 0.002, p_same=0.0001, is_small=True),
            ],
            sharing="not decided",
            verdicts={"local": "holds only with adapted statistics", "sync": "holds only with adapted statistics"},
            plots=[kinds()],
        ),
        finding(
            "covariate_shift",
            7,
            "Robustness to covariate shift between training and test",
            verdicts={"local": "does not hold", "sync": "not decided by 8 seeds with blur; does not hold with noise"},
            plots=[severities(), curve()],
        ),
        finding(
            "noisy_data",
            8,
            "Robustness to <b>noisy</b> data & *outliers*",
            method="Labels are <script>alert(1)</script> | wrong.",
            rows=[error("|x| < 3 & `more`", "local", "open", 0.25)],
            verdicts={"local": "not decided by 10 seeds", "sync": "does not hold", "group_norm": "does not hold"},
            versus=[versus("label noise of 40 %", "worse", -3.2, 0.0004), versus("outliers", "better", 8.1, 1e-6)],
            sharing="better with outliers; worse with label noise of 40 %",
            worse=[WORSE],
            better=["With outliers, synchronized statistics do better than per-device ones: 8.1 points."],
            plots=[labels()],
        ),
        finding(
            "training_time",
            9,
            "Shorter training time",
            sides=["local", "sync", "local_mean"],
            sharing="better at a rate of 0.1",
            verdicts={"local": "holds", "sync": "does not hold", "local_mean": "holds"},
            plots=[ladder()],
            command="python train.py +study=training_time \\\n  study.budget=full",
        ),
    ]
