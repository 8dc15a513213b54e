"""A loss that is nan or inf ends the run before it spoils the weights, and the message says where it began."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from syncbn.nn.modules import Synchronized
from syncbn.training.replay import Seen, all_finite, replay
from syncbn.training.schema import SettingError

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
    """Raises NonFiniteError at the first loss that is nan or inf, before its backward pass: the weights are unspoiled.

    The step is then run once more on this rank alone, to name the first layer whose output is not finite.

    Args:
        every_n_steps: how often to look. None: each step on the CPU, where it costs nothing; each
            ``trainer.log_every_n_steps`` on other devices, where a look waits for the device.

    Raises:
        SettingError: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError(f"callbacks.finite.every_n_steps={every_n_steps}: use 1 or more, or null")
        self.every_n_steps = every_n_steps
        self._batch: Any = None
        self._batch_idx = 0
        self._finite_at: int | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._batch_idx = batch, batch_idx

    def on_train_batch_end(self, *_: Any) -> None:
        self._batch = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Divided by accumulate_grad_batches and, in 16-mixed, scaled: either leaves finite what is finite.
        step, every = trainer.global_step, self.every_n_steps
        if every is None:
            every = 1 if loss.device.type == "cpu" else max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if step % every:
            return
        if all_finite(loss):
            self._finite_at = step
            return
        cause, guilty = self._cause(trainer, pl_module)
        value = loss.detach().sum().item()
        where = f"step {step} (epoch {trainer.current_epoch}, batch {self._batch_idx}) on rank {trainer.global_rank}"
        if every > 1 and self._finite_at is not None:
            where += f", and was finite at step {self._finite_at}"
        raise NonFiniteError(f"the loss is {value} at {where}: {cause}; {REMEDY}", guilty)

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


def _blame_layer(seen: Seen, in_batch: str | None) -> str:
    assert seen.layer is not None
    name, layer = seen.layer
    label = f"{name.replace('._orig_mod', '') or 'the LightningModule'} ({type(layer).__name__})"
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
        if isinstance(layer, _NormBase) and running(layer):
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
