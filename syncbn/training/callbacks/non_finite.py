"""Stops training when the loss is NaN or infinite, before the weights are updated, and names the first bad layer."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.nn.modules import Synchronized
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import COMPILED, NormBase
from syncbn.training.callbacks.compare_ranks import of_all_ranks
from syncbn.training.callbacks.layer_monitor import check_interval
from syncbn.training.callbacks.step_replay import ReplayResult, all_finite, replay
from syncbn.training.console import print_line
from syncbn.training.errors import SettingError

REMEDY = "lower optimizer.lr, set trainer.gradient_clip_val or check the data; the last checkpoint before it is kept"


class NonFiniteError(RuntimeError):
    """The loss is NaN or infinite.

    Attributes:
        guilty: whether this rank's own batch, weights or loss function caused it. With shared batch norm statistics,
            one rank's batch makes the loss of every rank non-finite in the same step.
    """

    def __init__(self, message: str, guilty: bool = False) -> None:
        super().__init__(message)
        self.guilty = guilty


class StopOnNonFinite(pl.Callback):
    """Stops training at the first loss that is NaN or infinite, before its backward pass.

    If every step is checked, the weights are then still good. With a longer interval, the steps since the last check
    have been taken and may have made weights non-finite.

    ``action="fail"`` raises NonFiniteError, which ends the run. ``action="stop"`` ends training without an error, for
    studies in which runs may diverge:

    - The step has no effect: no weight, optimizer state or running statistic changes, by any of the batches that the
      step accumulates. ``trainer.global_step`` counts it, though.
    - A line on stderr reports what happened.
    - No further resume point is saved. The test uses the last saved weights, or the current ones if none were saved.
    - Each check is an all-reduce of one number, since all ranks have to stop together.

    Each rank with a non-finite loss then repeats the step alone, to name the first layer whose output is not finite.

    Args:
        every_n_steps: steps between two checks. None: every step on the CPU, where a check is cheap, and every
            ``trainer.log_every_n_steps`` on other devices, where a check synchronizes with the device.
        action: "fail" or "stop".

    Attributes:
        diverged: whether this callback has stopped training.

    Raises:
        SettingError: ``every_n_steps`` is below 1, or ``action`` is neither "fail" nor "stop".
    """

    def __init__(self, every_n_steps: int | None = None, action: str = "fail") -> None:
        check_interval("finite", every_n_steps)
        if action not in ("fail", "stop"):
            raise SettingError("callbacks.finite.action", action, "use fail, or stop to end training without an error")
        self.every_n_steps, self.action = every_n_steps, action
        self.diverged = False
        self._batch: Any = None
        self._batch_idx = 0
        self._finite_at: int | None = None  # the last step that was checked and had a finite loss
        self._stop_after_batch = False
        self._own_loss: tuple[int, float] | None = None  # step and loss, if this rank's loss is not finite
        self._statistics: list[tuple[Tensor, Tensor]] = []  # running statistics, and copies from before the step
        self._copied_at: int | None = None  # the step that these copies belong to

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.diverged, self._copied_at = False, None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._batch_idx = batch, batch_idx
        step = trainer.global_step
        checks = self.action == "stop" and step % self._every(trainer, pl_module.device) == 0
        if checks and step != self._copied_at:  # with accumulate_grad_batches, copy before the first batch of the step
            self._statistics, self._copied_at = [(each, each.clone()) for each in _running(pl_module)], step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # The statistics are restored here, not in on_before_backward: the backward pass in between may have saved them,
        # and autograd raises if a saved tensor is changed in place. A replay restores them as well.
        if self._stop_after_batch:
            self._stop_after_batch = False
            _drop_gradients(pl_module)
            for statistic, before in self._statistics:
                statistic.copy_(before)
            self._report(trainer, self._own_loss and self._describe(trainer, pl_module, *self._own_loss))
        self._batch = None
        if trainer.global_step != self._copied_at:
            self._statistics = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.diverged:  # torch's optimizers skip a parameter without a gradient, and leave its state unchanged
            _drop_gradients(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Lightning has divided the loss by accumulate_grad_batches and, in 16-mixed, has multiplied it by the loss
        # scale. Neither makes a finite loss non-finite.
        step = trainer.global_step
        if self.diverged or step % self._every(trainer, loss.device):
            return
        finite = all_finite(loss)
        found = None if finite else (step, loss.detach().sum().item())
        if self.action == "stop" and _on_any_rank(trainer, not finite, loss.device):
            self._stop_after_batch, self._own_loss = True, found
            self._stop(trainer)
        elif found is not None:
            message, guilty = self._describe(trainer, pl_module, *found)
            raise NonFiniteError(f"{message}; {REMEDY}", guilty)
        else:
            self._finite_at = step

    def stops_at(self, trainer: pl.Trainer, non_finite: str | None) -> bool:
        """Whether training has stopped or stops now because a rank found something non-finite.

        This is a collective: every rank has to call it, and all ranks get the same answer.

        ``non_finite`` describes what this rank found; None if it found nothing.
        """
        if self.action != "stop" or self.diverged:
            return self.diverged
        if not _on_any_rank(trainer, non_finite is not None, trainer.lightning_module.device):
            return False
        self._stop(trainer)
        self._report(trainer, None if non_finite is None else (non_finite, True))
        return True

    def _every(self, trainer: pl.Trainer, device: torch.device) -> int:
        if self.every_n_steps is not None:
            return self.every_n_steps
        return 1 if device.type == "cpu" else max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]

    def _stop(self, trainer: pl.Trainer) -> None:
        self.diverged = trainer.should_stop = True
        # Lightning ignores should_stop until min_epochs and min_steps are reached.
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def _report(self, trainer: pl.Trainer, found: tuple[str, bool] | None) -> None:
        """Print the message of one rank, preferably of a guilty one; a collective. None: this rank found nothing."""
        message, _ = max(filter(None, of_all_ranks(trainer, found)), key=lambda each: each[1])
        if trainer.is_global_zero:
            print_line(f"warning: {message}; training stops here (callbacks.finite.action=stop)", error=True)

    def _describe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, value: float
    ) -> tuple[str, bool]:
        """The message with step, rank and cause, and whether this rank caused it."""
        cause, guilty = self._cause(trainer, pl_module)
        where = f"step {step} (epoch {trainer.current_epoch}, batch {self._batch_idx}) on rank {trainer.global_rank}"
        if self._every(trainer, pl_module.device) > 1 and self._finite_at is not None:
            where += f", and was finite at step {self._finite_at}"
        return f"the loss is {value} at {where}: {cause}", guilty

    def _cause(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, bool]:
        """The cause in words, and whether it lies on this rank."""
        result = replay(trainer, pl_module, self._batch, self._batch_idx)
        in_batch = "the batch itself holds non-finite numbers"
        if result.layer is not None:
            return _describe_layer(result, None if all_finite(self._batch) else in_batch), True
        if result.loss_finite is not True and not all_finite(self._batch):
            return in_batch, True
        if result.error is not None:
            return f"the layer is not known, since the step could not be run again ({result.error})", False
        if not result.loss_finite:
            return "every layer's output is finite, so it is the loss function", True
        shared = any(isinstance(layer, Synchronized | nn.SyncBatchNorm) for layer in pl_module.modules())
        if shared and trainer.world_size > 1:
            return "with this rank's own batch it is finite: another rank's batch caused it by shared statistics", False
        return "run again, the same step has a finite loss, so it depends on the random numbers of the step", True


def first_non_finite_parameter(module: nn.Module) -> str | None:
    """Name of the first parameter or batch norm running statistic that holds NaN or inf; None if all are finite.

    Other buffers are not checked: they may hold an inf on purpose, as an attention mask does. Synchronizes with a GPU
    once.
    """
    return _first_non_finite(module, running=lambda layer: True)


def stopper(trainer: pl.Trainer) -> StopOnNonFinite | None:
    """The trainer's StopOnNonFinite callback with ``action="stop"``, if it has one."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, StopOnNonFinite) and each.action == "stop"), None)


def _drop_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _on_any_rank(trainer: pl.Trainer, condition: bool, device: torch.device) -> bool:
    """Whether ``condition`` holds on any rank; a collective."""
    if trainer.world_size == 1:
        return condition
    flag = torch.tensor(int(condition), dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _running(module: nn.Module) -> list[Tensor]:
    """The tensors of normalization layers that a forward pass in training changes, also those of simulated devices."""
    layers = list(module.modules())
    buffers = [each for layer in layers if isinstance(layer, NormBase) for each in layer.buffers(recurse=False)]
    return buffers + [row for layer in layers if isinstance(layer, Simulated) for row in layer.rows or ()]


def _describe_layer(result: ReplayResult, in_batch: str | None) -> str:
    """Name the layer with the first non-finite output, and the reason: its parameters, its input or the batch."""
    assert result.layer is not None
    name, layer = result.layer
    label = f"{name.replace(f'.{COMPILED}', '') or 'the LightningModule'} ({type(layer).__name__})"
    # The running statistics of a layer in training mode are left out: this batch may have made them non-finite, and the
    # layer does not normalize with them.
    non_finite = _first_non_finite(layer, running=lambda norm: not norm.training)
    text = f"the first non-finite output is that of {label}"
    if non_finite is not None:
        return f"{text}, whose {non_finite} is not finite already"
    if result.input_finite:
        return f"{text}, whose input is finite"
    if in_batch is not None:
        return f"{in_batch}; {text}"
    return f"{text}, whose input is not finite though every layer's output before it is"


def _first_non_finite(module: nn.Module, running: Callable[[NormBase], bool]) -> str | None:
    """The first non-finite parameter, or running statistic of the normalization layers that ``running`` accepts."""
    named: list[tuple[str, Tensor]] = list(module.named_parameters())
    for prefix, layer in module.named_modules():
        if isinstance(layer, NormBase) and running(layer):
            statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
            named += [
                (f"{prefix}.{name}".removeprefix("."), each) for name, each in statistics.items() if each is not None
            ]
    places: dict[torch.device, list[int]] = defaultdict(list)
    for place, (_, tensor) in enumerate(named):
        places[tensor.device].append(place)
    non_finite = []
    for found in places.values():
        # One stack a device: to read each flag would wait for the GPU each time.
        flags = torch.stack([torch.isfinite(named[place][1].detach()).all() for place in found])
        non_finite += [place for place, finite in zip(found, flags.tolist(), strict=True) if not finite]
    return named[min(non_finite)][0] if non_finite else None
