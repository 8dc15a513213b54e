"""A loss that is nan or inf ends the training before it spoils the weights, and the message says where it began."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.nn.modules import Synchronized
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import COMPILED, NormBase
from syncbn.training.callbacks.step_replay import Seen, all_finite, replay
from syncbn.training.console import print_line
from syncbn.training.errors import SettingError

REMEDY = "lower optimizer.lr, set trainer.gradient_clip_val, look at the data; the last checkpoint before it is kept"


class NonFiniteError(RuntimeError):
    """The loss is nan or inf.

    Attributes:
        guilty: whether this rank's own batch, weights or loss function gave it; where batch norm statistics are shared,
            one rank's batch makes the loss of every rank non-finite in the same step.
    """

    def __init__(self, message: str, guilty: bool = False) -> None:
        super().__init__(message)
        self.guilty = guilty


class StopOnNonFinite(pl.Callback):
    """Ends training at the first loss that is nan or inf, before its backward pass: the weights are unspoiled.

    That is where each step is looked at; else steps since the last look have been taken, and may have spoiled them.

    With ``action="fail"`` by a NonFiniteError, which ends the run. With ``"stop"`` training ends well, for studies in
    which runs may diverge: that step is not taken (no weight, state of the optimizer or running statistic moves, by any
    of the batches that it accumulates, though ``trainer.global_step`` counts it), a line on stderr says what happened,
    nothing more is saved to go on from, and the test is of the last weights that were saved, or else of what there is.
    Then all ranks have to agree, which is a message of one number a look.

    The step is then run once more on each such rank alone, to name the first layer whose output is not finite.

    Args:
        every_n_steps: how often to look. None: each step on the CPU, where it costs nothing; each
            ``trainer.log_every_n_steps`` on other devices, where a look waits for the device.
        action: "fail" or "stop".

    Attributes:
        diverged: whether it has stopped training.

    Raises:
        SettingError: ``every_n_steps`` below 1; another word for ``action``.
    """

    def __init__(self, every_n_steps: int | None = None, action: str = "fail") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError("callbacks.finite.every_n_steps", every_n_steps, "use 1 or more, or null")
        if action not in ("fail", "stop"):
            raise SettingError("callbacks.finite.action", action, "use fail, or stop to end training without an error")
        self.every_n_steps, self.action = every_n_steps, action
        self.diverged = False
        self._batch: Any = None
        self._batch_idx = 0
        self._finite_at: int | None = None
        self._ends_here = False  # with this batch
        self._lost: tuple[int, float] | None = None  # at this step with this loss, where it is this rank's
        self._statistics: list[tuple[Tensor, Tensor]] = []  # each with what it was before the step
        self._kept_at: int | None = None  # that step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.diverged, self._kept_at = False, None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._batch_idx = batch, batch_idx
        step = trainer.global_step
        looks = self.action == "stop" and step % self._every(trainer, pl_module.device) == 0
        if looks and step != self._kept_at:  # of batches that are accumulated, before the first
            self._statistics, self._kept_at = [(each, each.clone()) for each in _running(pl_module)], step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._ends_here:  # only now: the backward pass may have kept the statistics, and a look restores them too
            self._ends_here = False
            _forget_gradients(pl_module)
            for statistic, before in self._statistics:
                statistic.copy_(before)
            self._tell(trainer, self._lost and self._what(trainer, pl_module, *self._lost))
        self._batch = None
        if trainer.global_step != self._kept_at:
            self._statistics = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.diverged:  # torch's optimizers leave a parameter that has no gradient alone, and its state too
            _forget_gradients(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Divided by accumulate_grad_batches and, in 16-mixed, scaled: either leaves finite what is finite.
        step = trainer.global_step
        if self.diverged or step % self._every(trainer, loss.device):
            return
        finite = all_finite(loss)
        found = None if finite else (step, loss.detach().sum().item())
        if self.action == "stop" and _on_any_rank(trainer, not finite, loss.device):
            self._ends_here, self._lost = True, found
            self._stop(trainer)
        elif found is not None:
            message, guilty = self._what(trainer, pl_module, *found)
            raise NonFiniteError(f"{message}; {REMEDY}", guilty)
        else:
            self._finite_at = step

    def stops_at(self, trainer: pl.Trainer, spoiled: str | None) -> bool:
        """Whether training has ended, or ends here; on all ranks alike, and each has to ask.

        Args:
            trainer: that trains.
            spoiled: what this rank has found not to be finite, in words.
        """
        if self.action != "stop" or self.diverged:
            return self.diverged
        if not _on_any_rank(trainer, spoiled is not None, trainer.lightning_module.device):
            return False
        self._stop(trainer)
        self._tell(trainer, None if spoiled is None else (spoiled, True))
        return True

    def _every(self, trainer: pl.Trainer, device: torch.device) -> int:
        if self.every_n_steps is not None:
            return self.every_n_steps
        return 1 if device.type == "cpu" else max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]

    def _stop(self, trainer: pl.Trainer) -> None:
        self.diverged = trainer.should_stop = True
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None  # or Lightning would train on

    def _tell(self, trainer: pl.Trainer, found: tuple[str, bool] | None) -> None:
        """Says what one of the ranks has found; guilty ones come first."""
        everybody = [found]
        if trainer.world_size > 1:
            everybody = [None] * trainer.world_size
            dist.all_gather_object(everybody, found)
        message, _ = max(filter(None, everybody), key=lambda each: each[1])
        if trainer.is_global_zero:
            line = f"warning: {message}; training ends here, as callbacks.finite.action=stop says"
            print_line(line, error=True)

    def _what(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, value: float) -> tuple[str, bool]:
        """What happened, where and why, in words, and whether this rank is to blame."""
        cause, guilty = self._cause(trainer, pl_module)
        where = f"step {step} (epoch {trainer.current_epoch}, batch {self._batch_idx}) on rank {trainer.global_rank}"
        if self._every(trainer, pl_module.device) > 1 and self._finite_at is not None:
            where += f", and was finite at step {self._finite_at}"
        return f"the loss is {value} at {where}: {cause}", guilty

    def _cause(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, bool]:
        """What is to blame, in words, and whether that is on this rank."""
        seen = replay(trainer, pl_module, self._batch, self._batch_idx)
        in_batch = "the batch itself holds non-finite numbers"
        if seen.layer is not None:
            return _blame_layer(seen, None if all_finite(self._batch) else in_batch), True
        if seen.loss_finite is not True and not all_finite(self._batch):
            return in_batch, True
        if seen.error is not None:
            return f"the layer is not known, since the step could not be run again ({seen.error})", False
        if not seen.loss_finite:
            return "every layer's output is finite, so it is the loss function", True
        shared = any(isinstance(layer, Synchronized | nn.SyncBatchNorm) for layer in pl_module.modules())
        if shared and trainer.world_size > 1:
            return "no layer of this rank's own batch gives one: another rank's batch did, by shared statistics", False
        return "run again, the same step gives a finite loss, so it hangs on what is random in it", True


def first_non_finite_parameter(module: nn.Module) -> str | None:
    """The name of the first parameter, or running statistic of a batch norm, that holds nan or inf; None if all are
    finite.

    Other buffers may well hold an inf, an attention mask for one. A GPU is waited for once.
    """
    return _first(_learned(module, running=lambda layer: True))


def stopper(trainer: pl.Trainer) -> StopOnNonFinite | None:
    """The callback that ends training well where it diverges, if there is one."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, StopOnNonFinite) and each.action == "stop"), None)


def _forget_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _on_any_rank(trainer: pl.Trainer, here: bool, device: torch.device) -> bool:
    if trainer.world_size == 1:
        return here
    flag = torch.tensor(int(here), dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _running(module: nn.Module) -> list[Tensor]:
    """What a forward pass in training changes in normalization layers, those of simulated devices too."""
    layers = list(module.modules())
    buffers = [each for layer in layers if isinstance(layer, NormBase) for each in layer.buffers(recurse=False)]
    return buffers + [row for layer in layers if isinstance(layer, Simulated) for row in layer.rows or ()]


def _blame_layer(seen: Seen, in_batch: str | None) -> str:
    assert seen.layer is not None
    name, layer = seen.layer
    label = f"{name.replace(f'.{COMPILED}', '') or 'the LightningModule'} ({type(layer).__name__})"
    # A layer that trains has its running statistics spoiled by this batch, and does not normalize with them.
    spoiled = _first(_learned(layer, running=lambda norm: not norm.training))
    text = f"the first non-finite output is that of {label}"
    if spoiled is not None:
        return f"{text}, whose {spoiled} is not finite already"
    if seen.input_finite:
        return f"{text}, whose input is finite"
    if in_batch is not None:
        return f"{in_batch}; {text}"
    return f"{text}, whose input is not finite though every layer's output before it is"


def _learned(module: nn.Module, running: Any) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    for prefix, layer in module.named_modules():
        if isinstance(layer, NormBase) and running(layer):
            for name in ("running_mean", "running_var"):
                if (buffer := getattr(layer, name)) is not None:
                    yield f"{prefix}.{name}".removeprefix("."), buffer


def _first(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    flags: dict[torch.device, list[Tensor]] = defaultdict(list)
    places: dict[torch.device, list[tuple[int, str]]] = defaultdict(list)
    for index, (name, tensor) in enumerate(tensors):
        flags[tensor.device].append(torch.isfinite(tensor.detach()).all())
        places[tensor.device].append((index, name))
    spoiled = [
        place
        for device, found in flags.items()
        for place, finite in zip(places[device], torch.stack(found).tolist(), strict=True)
        if not finite
    ]
    return min(spoiled)[1] if spoiled else None
