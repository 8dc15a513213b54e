"""Learning-rate schedules that are functions of the position in training, so that a resumed run can have more epochs.

torch's schedulers keep their length in their state and compute each value from the one before. Resumed with more
epochs, torch's CosineAnnealingLR continues with the old length, and the learning rate rises again.
"""

from collections.abc import Callable
from math import ceil, cos, pi
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from syncbn.training.errors import AgreedError, SettingError

KEPT = ("last_epoch", "base_lrs", "_step_count", "_last_lr", "lr_lambdas", "interval", "steps_per_epoch")  # of a state


class Schedule(LambdaLR):
    """A learning rate that is ``base lr * share(position)``, the position being counted in epochs.

    Args:
        optimizer: its present learning rates are the base.
        share: of a position, from 0.
        interval: "epoch" for one value an epoch, "step" for a new one in each optimizer step.
        warmup_epochs, warmup_steps: length of a linear rise to the base, one of the two; it has a value in each step.
            ``share`` begins after it.
        warmup_lr: learning rate of the first step, for parameters whose base is the optimizer's.

    Attributes:
        interval: how often Lightning has to call ``step()``; "step" with a warm-up too.
        steps_per_epoch: optimizer steps in an epoch, or a function that returns it and is called in the first step.
            Needed if ``interval`` is "step". :func:`lightning_config` sets it.

    Raises:
        SettingError: both lengths of the warm-up, or another interval.
    """

    steps_per_epoch: int | Callable[[], int] | None = None
    _loaded: tuple[int, int] | None = None  # what a checkpoint had counted, and how much of that is an epoch

    def __init__(
        self,
        optimizer: Optimizer,
        share: Callable[[float, float], float],
        *,
        interval: str = "epoch",
        warmup_epochs: float = 0,
        warmup_steps: int = 0,
        warmup_lr: float = 0.0,
    ) -> None:
        if warmup_epochs and warmup_steps:
            hint = f"scheduler.warmup_epochs={warmup_epochs} sets the same; use one of the two"
            raise SettingError("scheduler.warmup_steps", warmup_steps, hint)
        if interval not in ("epoch", "step"):
            raise SettingError("scheduler.interval", interval, "use epoch or step")
        self._each_step, self._share = interval == "step", share
        self._warmup_epochs, self._warmup_steps = warmup_epochs, warmup_steps
        base = optimizer.defaults.get("lr", 0.0)
        self._start = warmup_lr / base if base else 0.0
        self.interval = "step" if self._each_step or warmup_epochs or warmup_steps else "epoch"
        super().__init__(optimizer, lambda count: self._factor(count))

    def _factor(self, count: int) -> float:
        """The factor on the base after ``count`` calls of ``step()``."""
        if self.interval == "epoch":
            return self._share(float(count), 0.0)
        if count == 0:  # in __init__ the length of an epoch is not known yet, and the first value does not depend on it
            return self._start if self._warmup_epochs or self._warmup_steps else self._share(0.0, 0.0)
        steps = self._steps()
        warmup = self._warmup_steps or self._warmup_epochs * steps
        if count < warmup:
            return self._start + (1 - self._start) * count / warmup
        position = count / steps if self._each_step else float(count // steps)
        return self._share(max(position, warmup / steps), warmup / steps)

    def _steps(self) -> int:
        if callable(self.steps_per_epoch):
            now = self.steps_per_epoch()
            self.steps_per_epoch = now
        if self.steps_per_epoch is None:
            hint = "this schedule needs the steps of an epoch; use syncbn.training.lightning_config(optimizer, "
            raise SettingError("scheduler", hint=f"{hint}scheduler, trainer) in configure_optimizers")
        return self.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position, the base, and the unit of the position; not the length, which a resumed run may change."""
        state = {name: value for name, value in super().state_dict().items() if name in KEPT}
        steps = self.steps_per_epoch if isinstance(self.steps_per_epoch, int) else None
        return state | {"interval": self.interval, "steps_per_epoch": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, and compute the optimizer's learning rates from it."""
        interval, asked = self.interval, self.steps_per_epoch
        known = {name: value for name, value in state_dict.items() if name in KEPT}
        steps, unit = known.pop("steps_per_epoch", None), known.pop("interval", "epoch")
        super().load_state_dict(known | {"lr_lambdas": [None] * len(self.lr_lambdas)})
        self._loaded = (self.last_epoch, steps or 1)
        if interval == "epoch" and unit == "step":
            self.last_epoch //= steps or 1
        # Lightning 2.6 restores the schedule before it has made the loaders, so the steps of an epoch are those of the
        # checkpoint until the next step.
        self.steps_per_epoch = steps or 1
        self.restore([float(base) * self._factor(self.last_epoch) for base in self.base_lrs])
        self.steps_per_epoch = asked

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the next step or epoch."""
        if self._loaded is not None and self.interval == "step":
            count, steps = self._loaded
            if steps != (now := self._steps()):  # an epoch has another length now, or the schedule had one value in it
                self.last_epoch = round(count / steps * now)
        self._loaded = None
        super().step(epoch)

    def restore(self, rates: list[float]) -> None:
        """Give the optimizer what it has at a position that was loaded."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = list(rates)


class Cosine(Schedule):
    """Decreases the learning rate along half a cosine to ``final * lr`` (Loshchilov & Hutter 2017, eq. 5, one cycle).

    Args:
        optimizer: the optimizer whose learning rate is set.
        epochs: number of epochs until ``final`` is reached, the warm-up included.
        final: share of the initial learning rate at the end, from 0 to 1.
        more: ``interval`` and the warm-up of :class:`Schedule`.

    Raises:
        SettingError: ``epochs`` is not a positive whole number.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, final: float = 0.0, **more: Any) -> None:
        _check_epochs(epochs, "a cosine")

        def share(position: float, begin: float) -> float:
            done = (position - begin) / (epochs - begin) if epochs > begin else 1.0
            return final + (1 - final) * (1 + cos(pi * min(done, 1))) / 2

        super().__init__(optimizer, share, **more)


class Steps(Schedule):
    """Multiplies the learning rate by ``gamma`` at each milestone; the formula of torch's MultiStepLR.

    Args:
        optimizer: the optimizer whose learning rate is set.
        milestones: epochs, from the beginning of training, the warm-up included.
        gamma: factor at each milestone.
        more: ``interval`` and the warm-up of :class:`Schedule`.
    """

    def __init__(self, optimizer: Optimizer, milestones: list[float], gamma: float = 0.1, **more: Any) -> None:
        marks = sorted(milestones)
        super().__init__(optimizer, lambda at, _: gamma ** sum(mark <= at for mark in marks), **more)


class OneCycle(Schedule):
    """One cycle of learning rate and momentum (Smith & Topin 2019), with the formula and names of torch's OneCycleLR.

    The optimizer's ``lr`` is the highest rate. There is a new value in each step.

    Args:
        optimizer: the optimizer whose learning rate is set.
        epochs: length of the cycle.
        pct_start: share of the steps in which the rate rises.
        div_factor: the first rate is ``lr / div_factor``.
        final_div_factor: the last rate is the first one divided by this.
        cycle_momentum: also move the momentum (or Adam's first beta), from ``max_momentum`` down and up again.
        base_momentum: at the highest rate.
        max_momentum: at the lowest rates.

    Raises:
        SettingError: ``epochs`` is not a positive whole number; the optimizer has no momentum to move.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epochs: int,
        *,
        pct_start: float = 0.3,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
    ) -> None:
        _check_epochs(epochs, "a cycle")
        has = {key for key in ("momentum", "betas") if optimizer.defaults.get(key)}
        if cycle_momentum and not has:
            hint = f"{type(optimizer).__name__} has no momentum here; set one, or use scheduler.cycle_momentum=false"
            raise AgreedError("scheduler.cycle_momentum", True, hint)
        low = 1 / div_factor
        self._rate = _cycle(low, 1.0, low / final_div_factor, pct_start, epochs)
        self._momentum = (
            _cycle(max_momentum, base_momentum, max_momentum, pct_start, epochs) if cycle_momentum else None
        )
        super().__init__(optimizer, lambda at, _: 0.0, interval="step")

    def _factor(self, count: int) -> float:
        return self._rate(count, self._steps() if count else 1)

    def step(self, epoch: int | None = None) -> None:
        """Set the rate and the momentum of the next step."""
        super().step(epoch)
        self._move_momentum()

    def restore(self, rates: list[float]) -> None:
        """Give the optimizer the rates and the momentum that it has at a position that was loaded."""
        super().restore(rates)
        self._move_momentum()

    def _move_momentum(self) -> None:
        if self._momentum is None:
            return
        value = self._momentum(self.last_epoch, self._steps() if self.last_epoch else 1)
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (value, *group["betas"][1:])
            else:
                group["momentum"] = value


def _cycle(first: float, middle: float, last: float, rise: float, epochs: int) -> Callable[[int, int], float]:
    """Half a cosine from ``first`` to ``middle``, and one to ``last``; of a step and the steps of an epoch."""

    def value(count: int, steps: int) -> float:
        total = epochs * steps
        peak, end = rise * total - 1, total - 1
        if count == 0:
            return first
        if count <= peak:
            return _between(first, middle, count / peak)
        return _between(middle, last, min((count - peak) / (end - peak), 1.0) if end > peak else 1.0)

    return value


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + cos(pi * share))


def _check_epochs(epochs: Any, what: str) -> None:
    if not isinstance(epochs, int) or epochs < 1:
        hint = f"{what} needs an end; set trainer.max_epochs or scheduler=constant"
        raise SettingError("scheduler.epochs", epochs, hint)


def lightning_config(optimizer: Optimizer, scheduler: LRScheduler, trainer: pl.Trainer | None) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for any scheduler: ours step as often as their ``interval`` says.

    Args:
        optimizer: of the module.
        scheduler: of the optimizer; torch's own step once an epoch.
        trainer: of the module.
    """
    interval = getattr(scheduler, "interval", "epoch")
    if isinstance(scheduler, Schedule):
        scheduler.steps_per_epoch = None if trainer is None else lambda: steps_per_epoch(trainer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def steps_per_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps in an epoch: the last one may have fewer batches than ``accumulate_grad_batches``.

    Raises:
        AgreedError: the training data have no length.
    """
    batches = trainer.num_training_batches
    if batches == float("inf"):
        hint = "the training data have no length, so a step has no position in an epoch; use epoch without a warm-up, "
        raise AgreedError("scheduler.interval", "step", f"{hint}or trainer.limit_train_batches")
    return max(ceil(batches / trainer.accumulate_grad_batches), 1)
