"""Batch norm at test time with statistics of the test data in place of training's, for as long as one wants it.

What a layer normalizes with is a mean of two (Schneider et al. 2020, section 3; mean and variance alike)::

    N / (N + n) * source + n / (N + n) * batch

``source`` are the layer's running statistics, ``N`` is what these count for, in samples, and ``n`` is the number of
samples in the batch. Nado et al. 2020 have ``N = 0``: the batch alone. The batch's variance is the biased one, divided
by its number of values, so that ``N = 0`` is what the layer does in training; the paper's published code mixes in the
unbiased one. Samples are images, not positions: ``n`` does not grow with the size of an image.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from syncbn.nn import double_backward, eager_mode, functional, operands, statistics, tracing
from syncbn.nn.comm import all_reduce, groups
from syncbn.nn.conversion import third_party
from syncbn.nn.conversion.convert import Only, batch_norms, predicate, refuse_hidden
from syncbn.nn.kernels import dispatch
from syncbn.nn.torch_internals import BatchNormBase, forward_pre_hooks


def adapt(
    model: nn.Module, *, prior: float = 0.0, streaming: bool = False, group: object = "world", only: Only = None
) -> "Adaptation":
    """Makes batch norm layers normalize with statistics of the data that they are given, in evaluation mode.

    ::

        with syncbn.adapt(model, prior=16):
            predictions = model.eval()(images)

    Layers of any kind that has running statistics: torch's, this package's, and subclasses of them. Those in training
    mode do as always. The running statistics themselves are not touched, so neither are checkpoints; all that there is
    lies in hooks, which go away with :meth:`Adaptation.revert`. A deep copy has hooks of its own and stays adapted, so
    copy before. To a backward pass the statistics are constants.

    A forward pass sends one all-reduce a layer, of ``2C + 2`` float64 numbers, and none without a process group or in a
    group of one rank; so equally many forward passes on each rank, of batches of any size, empty ones too. Ranks
    normalize with the same bits. Compiled code calls no hooks: meanwhile all compiled code of the process runs eagerly.

    Args:
        model: any module, or a batch norm itself. What DistributedDataParallel wraps is taken out of it.
        prior: N, how many samples the running statistics count for; 0 for the batch alone, which wants batches that are
            fair samples, of 32 or more.
        streaming: the batch is all samples since it began, pooled, so that batches may be small.
        group: whose samples are the batch: "world", "node", a number of consecutive ranks, a ProcessGroup, or a
            DeviceMesh of one dimension.
        only: which layers, as for :func:`syncbn.convert`.

    Returns:
        A handle, and a context manager that reverts at its end.

    Raises:
        ValueError: ``prior`` below 0; a group that is none; no batch norm with running statistics among the layers; a
            layer, by name, that is adapted already.
        TypeError: a group of no such type; batch norm, by name, that is in no layer (see :func:`syncbn.convert`).
    """
    if isinstance(prior, bool) or not prior >= 0:
        raise ValueError(f"prior={prior}: use a number of samples, 0 (the batch alone) or more")
    spec = groups.parse(group)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    accepts = predicate(only)
    refuse_hidden(model, accepts)
    chosen = [(name, layer) for name, layer in batch_norms(model, accepts) if _has_source(layer)]
    if not chosen:
        raise ValueError("adapt: there is no batch norm layer to adapt that has running statistics")
    for name, layer in chosen:
        if any(isinstance(getattr(hook, "__self__", None), _Mixed) for hook in forward_pre_hooks(layer)):
            raise ValueError(f"adapt: {name or 'the module'} is adapted already; revert() that first")
    return Adaptation([(layer, _Mixed(name, float(prior), streaming, spec)) for name, layer in chosen])


class Adaptation:
    """Layers that are adapted, from when it is made until :meth:`revert`; :func:`adapt` makes it."""

    def __init__(self, layers: list[tuple[BatchNormBase, "_Mixed"]]) -> None:
        self._layers = layers
        self._hooks: list[RemovableHandle] = []
        eager_mode.run_eagerly()
        for layer, mixed in layers:
            self._hooks.append(layer.register_forward_pre_hook(mixed.put_in, with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(mixed.take_out, always_call=True))

    def revert(self) -> None:
        """From now on the layers normalize with their running statistics; may be called again."""
        if not self._hooks:
            return
        for layer, mixed in self._layers:
            mixed.take_out(layer)
        while self._hooks:
            self._hooks.pop().remove()
        eager_mode.run_as_before()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


class _Mixed:
    """The statistics of one layer: in its buffers during a forward pass, out of them after it."""

    def __init__(self, name: str, prior: float, streaming: bool, group: groups.GroupSpec) -> None:
        self._place, self._prior, self._streaming, self._group = f"{name} adapt", prior, streaming, group
        self._before: Tensor | None = None  # the message's sum over all forward passes, where it streams
        self._source: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def put_in(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward pass."""
        self.take_out(layer)  # which a KeyboardInterrupt has prevented
        assert isinstance(layer, BatchNormBase)
        x, mask = third_party.inputs(layer, args, kwargs)
        if layer.training or not _has_source(layer):
            return
        if x.dim() < 2 or x.shape[1] != layer.num_features or not operands.takes(x):
            return  # what is no input is for the layer to refuse
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"layer {self._place}: compiled code calls no hooks; revert() before the model is compiled"
            )
        if self._streaming and functional.recomputing():
            raise RuntimeError(
                f"layer {self._place}: activation checkpointing would count this batch again; use streaming=False"
            )
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        samples, sums = self._seen(x, mask).tensor_split([1])
        moments, n = statistics.unpack(sums), samples.squeeze()
        share = n / (n + self._prior).clamp_min(1)  # n is whole, so this is 1 at least but where it is 0
        self._source = mean, var
        layer.running_mean, layer.running_var = (
            torch.lerp(source.double(), batch, share).to(source.dtype)
            for source, batch in ((mean, moments.mean), (var, moments.var))
        )

    def take_out(self, layer: nn.Module, *_: Any) -> None:
        """A hook after it, however it ends."""
        if self._source is not None:
            layer.running_mean, layer.running_var = self._source
            self._source = None

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """How many samples the group's batch has, then its sums as :func:`syncbn.nn.statistics.pack` has them."""
        if tracing.transformed():
            sums = double_backward.measure(x, mask, None, self._place, None)
        else:
            sums = dispatch.local_sums(x, mask).sums
        message = torch.cat([_samples(x, mask), sums])
        if (partners := all_reduce.partners(self._group, self._place)) is not None:
            if tracing.transformed():
                message = double_backward.total(message, partners, self._place)
            else:
                message = all_reduce.all_sum(message, partners, self._place)
        if self._streaming:
            message = self._before = message if self._before is None else self._before + message
        return message


def _samples(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many there are of which anything counts: float64, shape ``(1,)``."""
    if mask is None:
        return x.new_full((1,), len(x) if x.numel() else 0, dtype=torch.float64)
    return mask.flatten(1).any(1).sum().double().reshape(1)


def _has_source(layer: BatchNormBase) -> bool:
    return layer.running_mean is not None and layer.running_var is not None
