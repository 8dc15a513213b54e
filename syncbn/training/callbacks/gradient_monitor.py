"""How gradients grow or vanish with depth: their norms layer by layer, at initialization and while a network trains."""

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

from syncbn.nn import eager_mode, functional
from syncbn.nn.torch_internals import ConvBase
from syncbn.training.callbacks.statistics_monitor import FEW
from syncbn.training.errors import SettingError
from syncbn.training.lightning_internals import logged_step
from syncbn.training.loggers.csv_logger import MetricsFile

COLUMNS = ("step", "layer", "depth", "norm", "weight_gradient", "weight_norm")
FEWEST = 3  # hidden layers from which a growth can be told


class Gradient(NamedTuple):
    """Of one layer, at one step; norms are Euclidean.

    Attributes:
        layer: its name.
        depth: how many layers with a weight come before it.
        norm: of the loss's gradient with respect to the layer's output, which is what goes back through the network;
            NaN where it was not seen.
        weight_gradient: of the gradient of its weight. Between layers it changes as ``norm`` does times what inputs do
            on their way forward, so one may hide the other.
        weight_norm: of the weight before the step.
        shape: of the weight.
    """

    layer: str
    depth: int
    norm: float
    weight_gradient: float
    weight_norm: float
    shape: tuple[int, ...]


class Backward:
    """Sees the gradients with respect to the outputs of linear and convolutional layers, until it is closed.

    Compiled code calls no hooks: meanwhile all compiled code of the process runs eagerly. A layer whose output goes on
    without a gradient cannot be seen. A recomputed forward pass counts as none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | ConvBase)]
        self._squares: dict[nn.Module, Tensor] = {}
        eager_mode.run_eagerly()
        self._hooks = [layer.register_forward_hook(self._watch) for layer in self.layers]
        self._closed = False

    def norms(self, scale: float = 1.0) -> dict[nn.Module, float]:
        """By layer, over all batches since it began and over all ranks, as of the mean of the ranks' losses.

        Sends a message where there are several ranks, and waits for the device once.

        Args:
            scale: what the losses were multiplied by.
        """
        if not self.layers:
            return {}
        device = next((each.device for each in self._squares.values()), self.layers[0].weight.device)
        none = torch.full((), math.nan, dtype=torch.float64, device=device)
        squares = torch.stack([self._squares.get(layer, none) for layer in self.layers])
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(squares)
        found = (squares.sqrt() / (scale * ranks)).tolist()
        return {layer: norm for layer, norm in zip(self.layers, found, strict=True) if not math.isnan(norm)}

    def close(self) -> None:
        if not self._closed:
            eager_mode.run_as_before()
        self._closed = True
        while self._hooks:
            self._hooks.pop().remove()

    def _watch(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad or functional.recomputing():
            return

        def add(gradient: Tensor) -> None:
            square = _norm(gradient.detach()).square()
            self._squares[layer] = self._squares[layer] + square if layer in self._squares else square

        output.register_hook(add)


class GradientMonitor(pl.Callback):
    """Looks at the norms of gradients layer by layer: of each layer's output, and of its weight.

    The layers are linear and convolutional ones, in the order in which they were registered, which is that of the
    forward pass in most networks. The gradient of a weight is what the optimizer is about to be given: averaged over
    ranks and accumulated batches, unscaled in 16-mixed, not yet clipped. That of an output is of the same loss; its
    norm is over all samples of the step, and takes one message where there are several ranks.

    Rank 0 writes ``gradients.csv``, a row a layer and look: ``step`` (as in ``metrics.csv``) and what
    :class:`Gradient` says. The loggers get ``gradients/LAYER`` for each layer, of more than 16 layers
    ``gradients/first`` and ``gradients/last``, and the numbers of :func:`flow`. Norms are taken in float64, so a
    gradient whose square would vanish in float32 is seen. The first step of training is always looked at: there the
    network is as it was initialized. Between looks nothing is done. A weight that has no gradient in a step has no row.
    With several optimizers (manual optimization) each step of one has rows of its own weights, of the batches whose
    number is due.

    Args:
        every_n_steps: optimizer steps between two looks; None for ``trainer.log_every_n_steps``.
        directory: where ``gradients.csv`` goes; None for ``trainer.log_dir``.

    Raises:
        SettingError: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int | None = None, directory: str | Path | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError("callbacks.gradients.every_n_steps", every_n_steps, "use 1 or more, or null")
        self.every_n_steps, self.directory = every_n_steps, directory
        self._file: MetricsFile | None = None
        self._backward: Backward | None = None
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    @property
    def gradients(self) -> dict[str, float]:
        """``gradients/growth`` and ``gradients/decades`` of the first step (see :func:`flow`), and with ``_end`` of the
        last that was looked at, by this process or an earlier attempt; without those that cannot be told.
        """
        return {f"gradients/{name}": value for name, value in self._first.items()} | {
            f"gradients/{name}_end": value for name, value in self._last.items()
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        directory = trainer.log_dir if self.directory is None else self.directory  # a message: all ranks ask
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            place = Path(directory or trainer.default_root_dir)
            place.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(place, "gradients.csv", COLUMNS)
            # What an earlier attempt has seen after the checkpoint comes again. The step is the loggers' (see there).
            self._file.cut(0, min(trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1))

    def on_train_epoch_start(self, *_: Any) -> None:
        self._drop()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps  # type: ignore[attr-defined]
        due = every > 0 and (logged_step(trainer) + 1) % every == 0  # when Lightning logs metrics of a step
        if self._backward is None and (due or trainer.global_step == 0):
            self._backward = Backward(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._backward is None:
            return
        norms = self._backward.norms(_scale(trainer))
        self._drop()
        if self._several(trainer):
            self._backward = Backward(pl_module)
        weights = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if not trainer.is_global_zero or not (found := look(pl_module, norms, weights)):
            return
        numbers = flow(found)
        if trainer.global_step == 0:
            self._first = numbers
        self._last = numbers
        if self._file is not None:
            rows = [{name: value for name, value in each._asdict().items() if name in COLUMNS} for each in found]
            self._file.append([{"step": logged_step(trainer), **row} for row in rows])
        by_layer = {each.layer: each.norm for each in found if not math.isnan(each.norm)}
        few = by_layer if len(by_layer) <= FEW else {"first": found[0].norm, "last": found[-1].norm}
        metrics = {f"gradients/{name}": value for name, value in (few | numbers).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, logged_step(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._several(trainer):
            self._drop()

    def on_train_end(self, *_: Any) -> None:
        self._drop()

    def on_exception(self, *_: Any) -> None:
        self._drop()

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._last = state_dict["first"], state_dict["last"]

    def _several(self, trainer: pl.Trainer) -> bool:
        """Whether more than one optimizer may step within a batch (manual optimization)."""
        return len(trainer.optimizers) > 1

    def _drop(self) -> None:
        if self._backward is not None:
            self._backward.close()
        self._backward = None


@torch.no_grad()
def look(
    module: nn.Module, norms: Mapping[nn.Module, float], only: Collection[nn.Parameter] | None = None
) -> list[Gradient]:
    """The gradients of linear and convolutional layers whose weights have one; waits for the device once.

    A weight that two layers share counts once, where the first of them is.

    Args:
        module: after a backward pass.
        norms: of the gradients with respect to outputs, by layer.
        only: weights of these parameters; None for all.
    """
    weights: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for name, layer in module.named_modules():
        weight = _weight(layer)
        if weight is not None:
            weights.setdefault(weight, (name, layer))
    found = [
        (depth, *of, weight)
        for depth, (weight, of) in enumerate(weights.items())
        if weight.grad is not None and (only is None or weight in only)
    ]
    if not found:
        return []
    of_weights = torch.stack([_norm(of) for *_, weight in found for of in (weight.grad, weight) if of is not None])
    return [
        Gradient(name, depth, norms.get(layer, math.nan), gradient, of_weight, tuple(weight.shape))
        for (depth, name, layer, weight), (gradient, of_weight) in zip(
            found, of_weights.view(-1, 2).tolist(), strict=True
        )
    ]


def flow(found: list[Gradient]) -> dict[str, float]:
    """How gradients change on their way back through the hidden layers.

    By the norms of gradients with respect to outputs. Hidden layers are those of the commonest shape of weight, the
    last layer of all (the head) apart, so that the norms are of equally many numbers. ``growth`` is the factor from one
    layer to the one before it, by least squares of the logarithm against depth: above 1 gradients grow backwards, below
    1 they vanish. ``decades`` is log10 of the first hidden layer's norm over the last one's. For ReLU and batch norm at
    initialization the growth is ``sqrt(pi / (pi - 1)) = 1.211`` (Yang et al. 2019).

    Returns:
        Those of ``growth`` and ``decades`` that can be told: not of fewer than three hidden layers, nor where a norm is
        zero or not finite.
    """
    inner = found[:-1]
    if not inner:
        return {}
    commonest = Counter(each.shape for each in inner).most_common(1)[0][0]
    hidden = [each for each in inner if each.shape == commonest]
    if len(hidden) < FEWEST or not all(0 < each.norm < math.inf for each in hidden):
        return {}
    logs = [math.log(each.norm) for each in hidden]
    slope = float(np.polynomial.polynomial.polyfit([each.depth for each in hidden], logs, 1)[1])
    return {"growth": math.exp(-slope), "decades": (logs[0] - logs[-1]) / math.log(10)}


def _scale(trainer: pl.Trainer) -> float:
    """What 16-mixed multiplies the loss by."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm


def _weight(layer: nn.Module) -> nn.Parameter | None:
    """The parameter ``weight`` of a linear or convolutional layer; None where a parametrization computes it."""
    if not isinstance(layer, nn.Linear | ConvBase):
        return None
    return dict(layer.named_parameters(recurse=False, remove_duplicate=False)).get("weight")
