"""Searches a learning rate: a short training in which it rises from step to step (Smith 2017), and nothing is kept.

Lightning's Tuner (2.6.6) is not used. It takes the loss of rank 0, replaces the callbacks that the norms need, writes a
checkpoint into the run directory, and its slope is over the rate, not over its logarithm.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist

from syncbn.training.atomic_write import replacing
from syncbn.training.config import validate_optimization
from syncbn.training.config.plan import Plan
from syncbn.training.errors import AgreedError
from syncbn.training.run_directory.paths import short

SMOOTHING = 0.9  # decay of the moving average of the loss; with Lightning's 0.98 it is 50 steps behind
DIVERGED = 4.0  # the search ends at this multiple of the lowest loss
SKIPPED = 10  # first steps without a suggestion, in which the average is of few values


class Curve(NamedTuple):
    """The learning rate, the loss over all devices, and its moving average, for each optimizer step."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]


class RateSearch(pl.Callback):
    """Sets the learning rate of each optimizer step, and records the loss over all ranks.

    A group of parameters has the rate times its ``lr_scale``.

    Args:
        min: rate of the first step.
        max: rate of the last step.
        steps: optimizer steps.
    """

    def __init__(self, min: float, max: float, steps: int) -> None:
        self.min, self.max, self.steps = min, max, steps
        self.curve = Curve([], [], [])
        self._losses: list[torch.Tensor] = []  # of the batches of this step
        self._average = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return float(self.min * (self.max / self.min) ** (step / (self.steps - 1)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if len(trainer.optimizers) != 1:
            hint = f"the module has {len(trainer.optimizers)} optimizers, and the search is for one; use mode=train"
            raise AgreedError("mode", "find_lr", hint)
        rate = self.rate(len(self.curve.rates))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, torch.Tensor):
            raise AgreedError(
                "mode", "find_lr", "training_step returns no loss, and the search needs it; use mode=train"
            )
        self._losses.append(loss.detach().float())
        if trainer.global_step == len(self.curve.rates):  # more batches are accumulated for this step
            return
        # Lightning has divided each loss by the number of batches of a whole step.
        total = torch.stack(self._losses).mean() * trainer.accumulate_grad_batches
        if dist.is_initialized():
            dist.all_reduce(total)
        self._losses = []
        self._record(float(total) / trainer.world_size)
        lowest = min(self.curve.smoothed)
        last = self.curve.smoothed[-1]
        if not last <= DIVERGED * lowest:  # also where it is NaN
            trainer.should_stop = True

    def _record(self, loss: float) -> None:
        step = len(self.curve.rates)
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        for values, value in zip(
            self.curve, (self.rate(step), loss, self._average / (1 - SMOOTHING ** (step + 1))), strict=True
        ):
            values.append(value)


def suggestion(curve: Curve) -> tuple[float, float]:
    """The rate at which the smoothed loss falls most steeply over the logarithm of the rate, and that of its minimum.

    Raises:
        AgreedError: the loss does not fall anywhere.
    """
    rates, smoothed = (np.array(each[SKIPPED:]) for each in (curve.rates, curve.smoothed))
    finite = np.isfinite(smoothed)
    rates, smoothed = rates[finite], smoothed[finite]
    slope = np.gradient(smoothed, np.log(rates)) if len(rates) > 2 else np.zeros(1)
    if not slope.min() < 0:
        hint = f"the loss does not fall in {len(curve.rates)} steps; use a smaller find_lr.min, or more find_lr.steps"
        raise AgreedError("find_lr.min", curve.rates[0] if curve.rates else None, hint)
    return float(rates[slope.argmin()]), float(rates[smoothed.argmin()])


def report(plan: Plan, curve: Curve, say: Callable[[str], None] | None) -> dict[str, Any]:
    """The result of a search, for ``result.json``; with ``say``, on rank 0, also as a line and as files.

    The suggestion is a value for ``optimizer.lr``: with ``optimizer.lr_batch`` it is for a batch of that size.
    """
    rate, lowest = suggestion(curve)
    batch = plan.cfg.optimizer.get("lr_batch")
    unit = 1.0 if batch is None else batch / validate_optimization.samples_per_step(plan.cfg)
    if say is not None:
        write(plan.run_dir, curve, rate)
        per = "" if batch is None else f" (for optimizer.lr_batch={batch})"
        say(
            f"suggested: optimizer.lr={rate * unit:.3g}{per}, where the loss falls fastest; it is lowest at "
            f"{lowest * unit:.3g}; the curve is in {short(plan.run_dir / 'find_lr.png')}"
        )
    return {"lr": rate * unit, "lowest_loss_at": lowest * unit, "steps": len(curve.rates)}


def write(run_dir: Path, curve: Curve, suggested: float) -> None:
    """Writes ``find_lr.csv`` and ``find_lr.png`` into the run directory."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("lr", "loss", "smoothed_loss"))
    rows.writerows(zip(*curve, strict=True))
    with replacing(run_dir / "find_lr.csv") as draft:
        draft.write_text(text.getvalue(), encoding="utf-8")
    with replacing(run_dir / "find_lr.png") as draft:
        _plot(curve, suggested).savefig(draft, format="png", dpi=150)


def _plot(curve: Curve, suggested: float) -> Any:
    from matplotlib.figure import Figure  # takes half a second; no pyplot, which would choose a display

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, color="0.8", label="loss")
    axes.plot(curve.rates, curve.smoothed, label="moving average")
    axes.axvline(suggested, color="C3", linestyle="--", label=f"suggestion {suggested:.3g}")
    finite = [value for value in curve.smoothed if np.isfinite(value)]
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0, 1.5 * max(finite[:20])))
    axes.legend()
    return figure
