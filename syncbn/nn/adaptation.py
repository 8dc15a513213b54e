"""Test-time adaptation: batch norm in evaluation with statistics of the test data, until reverted.

A layer normalizes with a weighted mean of two statistics (Schneider et al. 2020, section 3; mean and variance alike)::

    N / (N + n) * source + n / (N + n) * batch

``source`` are the layer's running statistics, ``N`` is their weight in samples, and ``n`` is the number of samples in
the batch. Nado et al. 2020 use ``N = 0``: the batch alone. The batch's variance is the biased one, divided
by its number of values, so that ``N = 0`` is what the layer does in training; the paper's published code mixes in the
unbiased one. Samples are images, not positions: ``n`` does not grow with the size of an image.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from syncbn.nn import functional, statistics, tracing
from syncbn.nn.autograd import double_backward, operands
from syncbn.nn.comm import all_reduce, groups
from syncbn.nn.conversion import third_party
from syncbn.nn.conversion.convert import Only, batch_norms, predicate, refuse_hidden
from syncbn.nn.kernels import dispatch, running_statistics
from syncbn.nn.torch_internals import BatchNormBase, forward_pre_hooks


def adapt(
    model: nn.Module, *, prior: float = 0.0, streaming: bool = False, group: object = "world", only: Only = None
) -> "Adaptation":
    """Makes batch norm layers normalize with the statistics of their input, in evaluation mode.

    ::

        with syncbn.adapt(model, prior=16):
            predictions = model.eval()(images)

    Layers of any kind that has running statistics: torch's, this package's, and subclasses of them. Layers in
    training mode are unchanged. Running statistics and checkpoints are unchanged too: the state is in hooks, which
    :meth:`Adaptation.revert` removes. A deep copy has its own hooks and stays adapted, so copy before. A backward pass
    treats the statistics as constants.

    A forward pass sends one all-reduce a layer, of ``2C + 2`` float64 numbers; none without a process group or in a
    group of one rank. So each rank must run the same number of forward passes, with batches of any size, empty ones
    too. Ranks normalize with the same bits. Until reverted, all compiled code of the process runs eagerly, because
    compiled code calls no hooks.

    Args:
        model: any module, or a batch norm itself. A DistributedDataParallel is unwrapped.
        prior: N, how many samples the running statistics count for; 0 for the batch alone, which needs
            representative batches of 32 samples or more.
        streaming: pool the statistics of all batches since the start, so that batches may be small.
        group: whose samples are the batch: "world", "node", a number of consecutive ranks, a ProcessGroup, or a
            DeviceMesh of one dimension.
        only: which layers, as for :func:`syncbn.convert`.

    Returns:
        A handle, and a context manager that reverts at its end.

    Raises:
        ValueError: ``prior`` below 0; an invalid group; no batch norm with running statistics among the layers; a
            layer, by name, that is adapted already.
        TypeError: a group of another type; batch norm, by name, outside any layer (see :func:`syncbn.convert`).
    """
    if isinstance(prior, bool) or not prior >= 0:
        raise ValueError(f"prior={prior}: use a number of samples, 0 (the batch alone) or more")
    spec = groups.parse(group)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    accepts = predicate(only)
    refuse_hidden(model, accepts)
    chosen = [(name, layer) for name, layer in batch_norms(model, accepts) if running_statistics.of_layer(layer)]
    if not chosen:
        raise ValueError("adapt: there is no batch norm layer to adapt that has running statistics")
    for name, layer in chosen:
        if any(isinstance(getattr(hook, "__self__", None), _Adapted) for hook in forward_pre_hooks(layer)):
            raise ValueError(f"adapt: {name or 'the module'} is adapted already; revert() that first")
    return Adaptation([(layer, _Adapted(name, float(prior), streaming, spec)) for name, layer in chosen])


class Adaptation:
    """A handle to adapted layers, which :func:`adapt` returns; they stay adapted until :meth:`revert`."""

    def __init__(self, layers: list[tuple[BatchNormBase, "_Adapted"]]) -> None:
        self._layers = layers
        self._hooks: list[RemovableHandle] = []
        tracing.run_eagerly()
        for layer, mixed in layers:
            self._hooks.append(layer.register_forward_pre_hook(mixed.put_in, with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(mixed.take_out, always_call=True))

    def revert(self) -> None:
        """Makes the layers normalize with their running statistics again; a second call does nothing."""
        if not self._hooks:
            return
        for layer, mixed in self._layers:
            mixed.take_out(layer)
        while self._hooks:
            self._hooks.pop().remove()
        tracing.run_as_before()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


class _Adapted:
    """The adapted statistics of one layer: they replace its buffers during each forward pass."""

    def __init__(self, name: str, prior: float, streaming: bool, group: groups.GroupSpec) -> None:
        self._place, self._prior, self._streaming, self._group = f"{name} adapt", prior, streaming, group
        self._before: Tensor | None = None  # the sums over all forward passes, if streaming
        self._source: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def put_in(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the forward pass: swaps the adapted statistics in."""
        self.take_out(layer)  # a KeyboardInterrupt may have prevented it after the last forward pass
        assert isinstance(layer, BatchNormBase)
        x, mask = third_party.inputs(layer, args, kwargs)
        running = running_statistics.of_layer(layer)
        if layer.training or running is None:
            return
        if x.dim() < 2 or x.shape[1] != layer.num_features or not operands.takes(x):
            return  # the layer raises its own error for such an input
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"layer {self._place}: compiled code calls no hooks; revert() before the model is compiled"
            )
        if self._streaming and functional.recomputing():
            raise RuntimeError(
                f"layer {self._place}: activation checkpointing would count this batch again; use streaming=False"
            )
        samples, sums = self._seen(x, mask).tensor_split([1])
        moments, n = statistics.unpack(sums), samples.squeeze()
        share = n / (n + self._prior).clamp_min(1)  # n is a whole number: at least 1, or the share is 0
        self._source = running
        layer.running_mean, layer.running_var = (
            torch.lerp(source.double(), batch, share).to(source.dtype)
            for source, batch in zip(running, (moments.mean, moments.var), strict=True)
        )

    def take_out(self, layer: nn.Module, *_: Any) -> None:
        """The hook after the forward pass, also after an exception: swaps the running statistics back."""
        if self._source is not None:
            layer.running_mean, layer.running_var = self._source
            self._source = None

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The number of samples of the group's batch, then its sums as of :func:`syncbn.nn.statistics.pack`."""
        if tracing.transformed():
            sums = double_backward.differentiable_sums(x, mask, None, self._place, None)
        else:
            sums = dispatch.local_sums(x, mask).sums
        seen = torch.cat([_samples(x, mask), sums])
        if (partners := all_reduce.partners(self._group, self._place)) is not None:
            if tracing.transformed():
                seen = double_backward.total(seen, partners, self._place)
            else:
                seen = all_reduce.all_sum(seen, partners, self._place)
        if self._streaming:
            seen = self._before = seen if self._before is None else self._before + seen
        return seen


def _samples(x: Tensor, mask: Tensor | None) -> Tensor:
    """The number of samples with at least one unmasked position: float64, shape ``(1,)``."""
    if mask is None:
        return x.new_full((1,), len(x) if x.numel() else 0, dtype=torch.float64)
    return mask.flatten(1).any(1).sum().double().reshape(1)
