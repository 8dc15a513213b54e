"""Repeats one training step on this rank only, to find the first layer whose output is not finite.

The other ranks are in their backward pass and would not join a collective, so collectives are refused during the
replay. Afterwards the model is in the state that it was in before.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from syncbn.nn.comm import all_reduce, c10d
from syncbn.nn.conversion import convert
from syncbn.nn.torch_internals import TorchDispatchMode, buffers_restored


@dataclass
class ReplayResult:
    """Result of a replayed step.

    Attributes:
        layer: name and module of the first layer whose output is not finite; None if there is none.
        input_finite: whether the input of that layer is finite.
        loss_finite: whether the loss is finite; None if the step ended before it.
        error: why the step could not be repeated to its end; None if it could, or if a layer was found.
    """

    layer: tuple[str, nn.Module] | None = None
    input_finite: bool = True
    loss_finite: bool | None = None
    error: str | None = None


def replay(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> ReplayResult:
    """Run ``training_step`` on ``batch`` until the first layer whose output is not finite.

    Synchronized layers normalize with this rank's own batch. Any other collective ends the replay with an error.
    """
    result = ReplayResult()
    step = pl_module.training_step
    arguments = (batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
    # isolate_rng does not restore the RNG state if its body raises (Lightning 2.6), so the try is inside of it.
    with isolate_rng():
        try:
            with (
                _state_restored(pl_module),
                _stop_at_non_finite_output(pl_module, result),
                warnings.catch_warnings(action="ignore"),  # the original step has already issued them
                all_reduce.alone(),
                torch.compiler.set_stance("force_eager"),  # compiled code calls no hooks
                torch.no_grad(),
                trainer.precision_plugin.train_step_context(),
                _RefuseCollectives(),  # type: ignore[no-untyped-call]
            ):
                # torch.nn.SyncBatchNorm calls its collectives itself, so it is converted to our layer, which
                # all_reduce.alone() keeps local. The group is WORLD because it exists already: creating another group
                # takes a collective.
                convert.convert(
                    pl_module,
                    group=dist.group.WORLD if dist.is_initialized() else "world",
                    only=lambda name, layer: type(layer) is nn.SyncBatchNorm,
                )
                output = step(*arguments)
            loss = output["loss"] if isinstance(output, Mapping) else output
            result.loss_finite = all_finite(loss)
        except _StopReplay:
            pass
        except Exception as error:
            if result.layer is None:
                result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return result


def all_finite(data: Any) -> bool:
    """Whether every dense tensor in ``data``, a tensor or nested collections of them, is finite.

    Synchronizes with the device.
    """
    tensors: list[Tensor] = []
    apply_to_collection(data, Tensor, tensors.append, allow_frozen=True)
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.layout is torch.strided)


class _StopReplay(BaseException):  # not an Exception: ``except Exception`` in a training_step must not catch it
    """Ends the replayed step early, once the result is known."""


class _RefuseCollectives(TorchDispatchMode):
    """Raises at any operation of a process group."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in c10d.NAMESPACES:
            raise RuntimeError(f"training_step calls a collective, {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _state_restored(pl_module: pl.LightningModule) -> Iterator[None]:
    """Restore classes, attributes and buffers of all modules, metrics included, when the context ends.

    Within the context ``log`` and the ``update`` of metrics do nothing, and ``manual_backward`` ends the step.
    """
    layers = list(pl_module.modules())
    attributes = [(layer, type(layer), dict(vars(layer))) for layer in layers]
    vars(pl_module)["log"] = _do_nothing
    vars(pl_module)["manual_backward"] = _stop_before_backward
    for layer in layers:
        if isinstance(layer, Metric):
            vars(layer)["update"] = _do_nothing
    try:
        with buffers_restored(pl_module):
            yield
    finally:
        for layer, original_class, before in attributes:
            layer.__class__ = original_class  # convert() has changed the class of torch.nn.SyncBatchNorm layers
            vars(layer).clear()
            vars(layer).update(before)


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


def _stop_before_backward(loss: Tensor, *_: Any, **__: Any) -> None:
    """Replaces ``manual_backward``: the code after it would step an optimizer and change the weights."""
    if all_finite(loss):
        raise RuntimeError("training_step calls manual_backward, and all values before the first call are finite")
    raise _StopReplay


@contextmanager
def _stop_at_non_finite_output(pl_module: pl.LightningModule, result: ReplayResult) -> Iterator[None]:
    """End the step at the first non-finite output.

    The forward of an inner layer returns before that of the module around it, so the innermost layer is found.
    """
    inputs: dict[nn.Module, bool] = {}
    metrics = {part for metric in pl_module.modules() if isinstance(metric, Metric) for part in metric.modules()}

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[layer] = all_finite((args, kwargs))

    def after(name: str) -> Any:
        def check(layer: nn.Module, _: Any, output: Any) -> None:
            if result.layer is None and not all_finite(output):
                result.layer, result.input_finite = (name, layer), inputs[layer]
                raise _StopReplay

        return check

    handles = []
    for name, layer in pl_module.named_modules():
        if layer not in metrics:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
