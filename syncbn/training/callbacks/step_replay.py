"""One training step once more, on this rank alone: where does the first number that is not finite come from?

The other ranks are in their backward pass and would not answer, so nothing is sent. The model is afterwards what it was
before.
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
from syncbn.nn.torch_internals import TorchDispatchMode, registered_buffers


@dataclass
class Seen:
    """What came out of a step that was run again.

    Attributes:
        layer: the first layer whose output is not finite, and its name; None where there is none.
        input_finite: whether that layer's input is.
        loss_finite: whether the loss is; None where the step did not come so far.
        error: why the step could not be run again to its end; None where it was, or where a layer was found.
    """

    layer: tuple[str, nn.Module] | None = None
    input_finite: bool = True
    loss_finite: bool | None = None
    error: str | None = None


def replay(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Seen:
    """Runs ``training_step`` on ``batch`` until the first layer whose output is not finite.

    Synchronized layers normalize with this rank's own batch. Any other message that the step would send ends it.
    """
    seen = Seen()
    step = pl_module.training_step
    arguments = (batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
    with isolate_rng():  # it does not bear an exception
        try:
            with (
                _left_as_it_was(pl_module),
                _watched(pl_module, seen),
                warnings.catch_warnings(action="ignore"),  # the step itself has given them
                all_reduce.alone(),
                torch.compiler.set_stance("force_eager"),  # compiled code calls no hooks
                torch.no_grad(),
                trainer.precision_plugin.train_step_context(),
                _Silence(),  # type: ignore[no-untyped-call]
            ):
                # torch's own synchronized layer sends in its own way; its twin does not here. A group of ours may not
                # be made yet, which takes all ranks; this one is there.
                convert.convert(
                    pl_module,
                    group=dist.group.WORLD if dist.is_initialized() else "world",
                    only=lambda name, layer: type(layer) is nn.SyncBatchNorm,
                )
                output = step(*arguments)
            loss = output["loss"] if isinstance(output, Mapping) else output
            seen.loss_finite = all_finite(loss)
        except _Enough:
            pass
        except Exception as error:
            if seen.layer is None:
                seen.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return seen


def all_finite(data: Any) -> bool:
    """Whether every dense tensor in ``data``, any nesting of collections, is finite; waits for the device."""
    tensors: list[Tensor] = []
    apply_to_collection(data, Tensor, tensors.append, allow_frozen=True)
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.layout is torch.strided)


class _Enough(BaseException):  # no error, and not to be caught by what the step may catch
    """Ends the step: everything that there is to see has been seen."""


class _Silence(TorchDispatchMode):
    """Refuses whatever goes through a process group."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in c10d.NAMESPACES:
            raise RuntimeError(f"training_step sends a message of its own, {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _left_as_it_was(pl_module: pl.LightningModule) -> Iterator[None]:
    """Takes back what a step does to attributes and buffers, of metrics too, and lets it log and measure nothing."""
    layers = list(pl_module.modules())
    attributes = [(layer, type(layer), dict(vars(layer))) for layer in layers]
    buffers = [(registered, dict(registered)) for registered in map(registered_buffers, layers)]
    values = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    vars(pl_module)["log"] = _nothing
    vars(pl_module)["manual_backward"] = _stop_before_backward
    for layer in layers:
        if isinstance(layer, Metric):
            vars(layer)["update"] = _nothing
    try:
        yield
    finally:
        for layer, kind, before in attributes:
            layer.__class__ = kind
            vars(layer).clear()
            vars(layer).update(before)
        for home, names in buffers:
            home.update(names)
        for buffer, value in values:
            buffer.copy_(value)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _stop_before_backward(loss: Tensor, *_: Any, **__: Any) -> None:
    """In place of ``manual_backward``, after which the step would change the weights."""
    if all_finite(loss):
        raise RuntimeError("training_step calls manual_backward, and up to the first call all is finite")
    raise _Enough


@contextmanager
def _watched(pl_module: pl.LightningModule, seen: Seen) -> Iterator[None]:
    """Ends the step at the first non-finite output. Inner layers end before outer ones, so it is the innermost's."""
    inputs: dict[nn.Module, bool] = {}
    metrics = {part for metric in pl_module.modules() if isinstance(metric, Metric) for part in metric.modules()}

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[layer] = all_finite((args, kwargs))

    def after(name: str) -> Any:
        def look(layer: nn.Module, _: Any, output: Any) -> None:
            if seen.layer is None and not all_finite(output):
                seen.layer, seen.input_finite = (name, layer), inputs[layer]
                raise _Enough

        return look

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
