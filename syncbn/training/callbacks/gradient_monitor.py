"""Logs gradient norms per layer, to show whether gradients grow or vanish with depth, from initialization on."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.nn import functional, tracing
from syncbn.nn.torch_internals import ConvBase
from syncbn.training.callbacks.layer_monitor import MAX_LOGGED_LAYERS, LayerMonitor
from syncbn.training.lightning_internals import logged_step

COLUMNS = ("step", "layer", "depth", "norm", "weight_gradient", "weight_norm")
MIN_HIDDEN_LAYERS = 3  # with fewer hidden layers no growth is fitted


class LayerGradient(NamedTuple):
    """Gradient norms of one layer at one step; norms are Euclidean.

    Attributes:
        layer: name of the layer.
        depth: number of layers with a weight before it.
        norm: norm of the loss's gradient with respect to the layer's output, which is what backpropagation passes on;
            NaN where it was not recorded.
        weight_gradient: norm of the gradient of the layer's weight. From layer to layer it changes like ``norm`` times
            the norm of the layer's input, so the two changes may cancel.
        weight_norm: norm of the weight before the step.
        shape: shape of the weight.
    """

    layer: str
    depth: int
    norm: float
    weight_gradient: float
    weight_norm: float
    shape: tuple[int, ...]


class OutputGradients:
    """Records gradient norms with respect to the outputs of linear and convolutional layers until it is closed.

    Compiled code calls no hooks, so all compiled code of the process runs eagerly while an instance is open. A layer
    whose output does not require a gradient is not recorded. The recomputed forward pass of activation checkpointing
    is ignored.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | ConvBase)]
        self._squares: dict[nn.Module, Tensor] = {}
        tracing.run_eagerly()
        self._hooks = [layer.register_forward_hook(self._forward_hook) for layer in self.layers]
        self._closed = False

    def norms(self, scale: float = 1.0) -> dict[nn.Module, float]:
        """Norm per layer, over all batches recorded so far and over all ranks.

        The loss is the mean of the ranks' losses, which were multiplied by ``scale`` (the loss scale of 16-mixed). With
        several ranks this is one all-reduce; it synchronizes with the device once.
        """
        if not self.layers:
            return {}
        device = next((each.device for each in self._squares.values()), self.layers[0].weight.device)
        # Every rank sends one number per layer, so that the all-reduce has the same size everywhere. NaN marks a layer
        # without a gradient; the sum over the ranks stays NaN, and the layer is left out below.
        missing = torch.full((), math.nan, dtype=torch.float64, device=device)
        squares = torch.stack([self._squares.get(layer, missing) for layer in self.layers])
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(squares)
        found = (squares.sqrt() / (scale * ranks)).tolist()
        return {layer: norm for layer, norm in zip(self.layers, found, strict=True) if not math.isnan(norm)}

    def close(self) -> None:
        """Remove the hooks and let compiled code run again; later calls do nothing."""
        if not self._closed:
            tracing.run_as_before()
        self._closed = True
        while self._hooks:
            self._hooks.pop().remove()

    def _forward_hook(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad or functional.recomputing():
            return
        # A tensor hook, since register_full_backward_hook makes the output a view of a custom Function, and torch 2.13
        # then raises where an in-place activation such as ReLU(inplace=True) follows.

        def add(gradient: Tensor) -> None:
            square = _norm(gradient.detach()).square()
            self._squares[layer] = self._squares[layer] + square if layer in self._squares else square

        output.register_hook(add)


class GradientMonitor(LayerMonitor):
    """Logs two gradient norms per layer: with respect to the layer's output, and with respect to its weight.

    The layers are the linear and convolutional ones, in the order of registration, which in most networks is the order
    of the forward pass. The gradient of a weight is the one that the optimizer is about to use: averaged over ranks and
    accumulated batches, unscaled in 16-mixed, not yet clipped. The gradient of an output belongs to the same loss; its
    norm is over all samples of the step, and takes one all-reduce where there are several ranks.

    Rank 0 writes ``gradients.csv``, one row per layer and measured step: ``step`` (as in ``metrics.csv``) and the
    fields of :class:`LayerGradient` without the shape. The loggers get ``gradients/LAYER`` for each layer, with more
    than 16 layers ``gradients/first`` and ``gradients/last`` instead, and the results of :func:`gradient_growth`.
    Norms are computed in float64, so a gradient whose square would underflow in float32 is not lost. The first training
    step is always measured, when the network is as it was initialized. Steps in between cost nothing. A weight without
    a gradient in a step has no row. With several optimizers (manual optimization) each optimizer step of a measured
    batch writes rows for its own weights.

    Args:
        every_n_steps: optimizer steps between two measurements; None for ``trainer.log_every_n_steps``.
        directory: directory of ``gradients.csv``; None for ``trainer.log_dir``.

    Raises:
        SettingError: ``every_n_steps`` below 1.
    """

    name = "gradients"

    def __init__(self, every_n_steps: int | None = None, directory: str | Path | None = None) -> None:
        super().__init__(every_n_steps, directory)
        self._outputs: OutputGradients | None = None  # not None in a step that is measured
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    @property
    def gradients(self) -> dict[str, float]:
        """Results of :func:`gradient_growth` at the first step and, with the suffix ``_end``, at the last measured one.

        The names are ``gradients/growth`` and ``gradients/decades``. A resumed run includes the steps that earlier
        attempts measured. A number that could not be computed is left out.
        """
        return {f"gradients/{name}": value for name, value in self._first.items()} | {
            f"gradients/{name}_end": value for name, value in self._last.items()
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open_file(trainer, COLUMNS)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._outputs is None and (self._is_due(trainer) or trainer.global_step == 0):
            self._outputs = OutputGradients(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._outputs is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of precision=16-mixed
        norms = self._outputs.norms(1.0 if scaler is None else scaler.get_scale())
        self._close()
        if len(trainer.optimizers) > 1:  # with manual optimization each may step within a batch
            self._outputs = OutputGradients(pl_module)
        weights = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if not trainer.is_global_zero or not (found := layer_gradients(pl_module, norms, weights)):
            return
        numbers = gradient_growth(found)
        if trainer.global_step == 0:
            self._first = numbers
        self._last = numbers
        if self._file is not None:
            rows = [{name: value for name, value in each._asdict().items() if name in COLUMNS} for each in found]
            self._file.append([{"step": logged_step(trainer), **row} for row in rows])
        by_layer = {each.layer: each.norm for each in found if not math.isnan(each.norm)}
        logged = by_layer if len(by_layer) <= MAX_LOGGED_LAYERS else {"first": found[0].norm, "last": found[-1].norm}
        self._log(trainer, {f"gradients/{name}": value for name, value in (logged | numbers).items()})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if len(trainer.optimizers) > 1:
            self._close()

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._last = state_dict["first"], state_dict["last"]

    def _close(self, *_: Any, **__: Any) -> None:
        if self._outputs is not None:
            self._outputs.close()
        self._outputs = None

    on_train_epoch_start = on_train_end = on_exception = _close


@torch.no_grad()
def layer_gradients(
    module: nn.Module, norms: Mapping[nn.Module, float], only: Collection[nn.Parameter] | None = None
) -> list[LayerGradient]:
    """Return the gradient norms of linear and convolutional layers, in order of registration.

    A layer whose weight has no gradient, or is not in ``only``, is left out. A weight that two layers share counts
    once, at the first of them. ``norms`` are those of the outputs. Synchronizes with the device once.
    """
    weights: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for name, layer in module.named_modules():
        weight = _weight(layer)
        if weight is not None:
            weights.setdefault(weight, (name, layer))
    found = [
        (depth, *named_layer, weight)
        for depth, (weight, named_layer) in enumerate(weights.items())
        if weight.grad is not None and (only is None or weight in only)
    ]
    if not found:
        return []
    pairs = torch.stack([_norm(each) for *_, weight in found for each in (weight.grad, weight) if each is not None])
    return [
        LayerGradient(name, depth, norms.get(layer, math.nan), gradient, weight_norm, tuple(weight.shape))
        for (depth, name, layer, weight), (gradient, weight_norm) in zip(found, pairs.view(-1, 2).tolist(), strict=True)
    ]


def gradient_growth(found: list[LayerGradient]) -> dict[str, float]:
    """Measure how gradient norms change from layer to layer in the backward pass through the hidden layers.

    The norms are of gradients with respect to outputs. The hidden layers are the layers with the most common weight
    shape, without the last layer of the network (the head), so that all norms are over equally many numbers.
    ``growth`` is the factor from one layer to the layer before it, from a least-squares fit of the logarithm against
    depth. Above 1, gradients grow in the backward pass; below 1, they vanish. ``decades`` is log10 of the first hidden
    layer's norm divided by the last one's. For ReLU and batch norm at initialization the growth is
    ``sqrt(pi / (pi - 1)) = 1.211`` (Yang et al. 2019).

    Returns:
        ``growth`` and ``decades``; empty with fewer than three hidden layers, or where a norm is zero or not finite.
    """
    inner = found[:-1]
    if not inner:
        return {}
    commonest = Counter(each.shape for each in inner).most_common(1)[0][0]
    hidden = [each for each in inner if each.shape == commonest]
    if len(hidden) < MIN_HIDDEN_LAYERS or not all(0 < each.norm < math.inf for each in hidden):
        return {}
    logs = [math.log(each.norm) for each in hidden]
    slope = float(np.polynomial.polynomial.polyfit([each.depth for each in hidden], logs, 1)[1])
    return {"growth": math.exp(-slope), "decades": (logs[0] - logs[-1]) / math.log(10)}


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm


def _weight(layer: nn.Module) -> nn.Parameter | None:
    """The parameter ``weight`` of a linear or convolutional layer; None if a parametrization computes the weight."""
    if not isinstance(layer, nn.Linear | ConvBase):
        return None
    return dict(layer.named_parameters(recurse=False, remove_duplicate=False)).get("weight")
