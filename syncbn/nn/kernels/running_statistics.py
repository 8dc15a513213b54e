"""The update rule of running statistics and of the count of batches, for every layer and every device.

The rule in full: a batch of ``n`` values a channel counts in ``num_batches_tracked`` if ``n`` is 1 or more. It moves
the mean if ``n`` is 1 or more, and the variance if ``n`` is 2 or more. ``running = (1 - share) * running + share *
batch``, in float64 and rounded once, where ``share`` is the momentum, or ``1 / num_batches_tracked`` without one. The
variance is the unbiased one unless the layer keeps the biased one.

The arithmetic is repeated in three kernels: ``cpu.c`` and ``triton_kernels.update_running``, which tests compare with
:func:`move`, and torch's own, for which :func:`torch_momentum` counts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.kernels import cpu, gpu
from syncbn.nn.statistics import Moments, number_or_tensor, unpack
from syncbn.nn.torch_internals import BatchNormBase


class RunningStatistics(NamedTuple):
    """The buffers of a layer, and how they move.

    Attributes:
        mean, var: shape ``(C,)``; or None.
        tracked: how many batches they have seen, a scalar; or None.
        momentum: share of the new batch; None for the average over all batches, which needs ``tracked``.
        biased: whether they move towards the variance divided by ``n`` instead of ``n - 1``.
    """

    mean: Tensor | None
    var: Tensor | None
    tracked: Tensor | None
    momentum: float | None
    biased: bool

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Mean, variance and count, or None where there is nothing to move."""
        return None if self.mean is None or self.var is None else (self.mean, self.var, self.tracked)


def learn(running: RunningStatistics, seen: Tensor | Moments, name: str = "sync_batch_norm") -> Tensor | None:
    """Moves the running statistics by one batch and counts it, unless it has no values.

    Args:
        running: what to move; without a mean and a variance nothing happens.
        seen: the batch's sums, or moments to move towards as they are.
        name: what errors call the layer.

    Returns:
        The batch's statistics, where the update computed them.

    Raises:
        RuntimeError: under ``torch.func.vmap``, where batches differ and the running statistics are shared.
    """
    mean, var, tracked, momentum, biased = running
    if mean is None or var is None:
        return None
    if tracing.transformed():
        parts = (seen,) if isinstance(seen, Tensor) else seen
        _Learn.apply(mean, var, tracked, momentum, biased, name, *parts)  # type: ignore[no-untyped-call]
        return None
    return update(mean, var, seen, momentum, biased, tracked)


def of_layer(layer: BatchNormBase) -> tuple[Tensor, Tensor] | None:
    """The running mean and variance of a layer; None if it has none."""
    mean, var = layer.running_mean, layer.running_var
    return None if mean is None or var is None else (mean, var)


def torch_momentum(running: RunningStatistics) -> float:
    """Counts a batch, and returns the momentum for torch's kernel, as ``torch.nn.BatchNorm2d.forward`` (torch 2.13)."""
    if running.tracked is not None:
        running.tracked.add_(1)
        if running.momentum is None:
            return 1.0 / float(running.tracked)
    return 0.0 if running.momentum is None else running.momentum


def update(
    running_mean: Tensor,
    running_var: Tensor,
    seen: Tensor | Moments,
    momentum: float | None,
    biased: bool = False,
    tracked: Tensor | None = None,
) -> Tensor | None:
    """:func:`learn`, outside transforms of ``torch.func``: by one kernel where there is one for these tensors."""
    share: float | Tensor | None = fixed_share(momentum, tracked)
    if share is not None and isinstance(seen, Tensor):
        kernels = gpu if gpu.serves(seen) else cpu
        if kernels.takes_running(running_mean, running_var, tracked, seen):
            found: Tensor = kernels.update_running(running_mean, running_var, tracked, seen, share, biased)
            return found
    if tracked is not None:
        tracked.add_(number_or_tensor(seen[0]) > 0)
        if share is None:
            share = 1 / tracked.clamp_min(1).double()  # a tensor: the host need not wait for the device
    assert share is not None
    move(running_mean, running_var, target(seen, biased), share)
    return None


def fixed_share(momentum: float | None, tracked: Tensor | None) -> float | None:
    """The share of a new batch, if it does not depend on how many there were before: the kernels take a number."""
    if momentum is None:
        return 0.0 if tracked is None else None
    return float(momentum)


def target(seen: Tensor | Moments, biased: bool) -> Moments:
    """What the running statistics move towards after a batch with these sums; moments as they are."""
    if isinstance(seen, Moments):
        return seen
    moments = unpack(seen)
    return moments if biased else moments.unbiased()


@torch.no_grad()
def move(running_mean: Tensor, running_var: Tensor, moments: Moments, share: float | Tensor) -> None:
    """``running = (1 - share) * running + share * batch``, in place.

    Args:
        running_mean, running_var: shape ``(C,)``, any floating type; only the result is rounded to it.
        moments: what to move towards. ``n = 0`` moves neither, ``n = 1`` leaves ``running_var``.
        share: a number, or a scalar tensor so that a cumulative average need not wait for the device.
    """
    n = number_or_tensor(moments.n)
    for running, batch, least in _with_least_n(running_mean, running_var, moments):
        step = (n >= least).double() * share if isinstance(n, Tensor) else (n >= least) * share
        running.copy_(torch.lerp(running.double(), batch, step))


@torch.no_grad()
def replace(running_mean: Tensor, running_var: Tensor, moments: Moments) -> None:
    """Overwrites the running statistics with these moments, NaN included, for the same ``n`` as an update."""
    for running, batch, least in _with_least_n(running_mean, running_var, moments):
        if moments.n >= least:
            running.copy_(batch)


def _with_least_n(
    running_mean: Tensor, running_var: Tensor, moments: Moments
) -> tuple[tuple[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]:
    """Each buffer, what it moves towards, and how many values that takes: one has a mean, but no variance."""
    return (running_mean, moments.mean, 1), (running_var, moments.var, 2)


def in_turn(batches: int, tracked: Tensor | None, momentum: float | None) -> tuple[Tensor, float | Tensor]:
    """Several batches one after the other, as one: counts them, and returns weights and a share.

    :func:`move` by the mean of the batches' moments with these weights, and by that share, is the same as moving by
    each batch in turn.

    Returns:
        The weights, float64 of shape ``(batches,)``, whose sum is 1; the share.
    """
    if tracked is not None:
        tracked.add_(batches)
    ages = torch.arange(batches - 1, -1, -1, dtype=torch.float64)
    share: float | Tensor
    if momentum is None:
        assert tracked is not None
        weights, share = torch.ones_like(ages), batches / tracked.double()
    else:
        weights = (1 - momentum) ** ages
        share = momentum * weights.sum().item()
    return weights / weights.sum(), share


class _Learn(torch.autograd.Function):
    """:func:`learn` under transforms of ``torch.func``: below all of them, where buffers may change in place."""

    @staticmethod
    def forward(
        running_mean: Tensor,
        running_var: Tensor,
        tracked: Tensor | None,
        momentum: float | None,
        biased: bool,
        name: str,
        *seen: Tensor,
    ) -> Tensor:
        update(running_mean, running_var, seen[0] if len(seen) == 1 else Moments(*seen), momentum, biased, tracked)
        return running_mean.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * 9

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        running_mean: Tensor,
        running_var: Tensor,
        tracked: Tensor | None,
        momentum: float | None,
        biased: bool,
        name: str,
        *seen: Tensor,
    ) -> tuple[Tensor, None]:
        """One batch after the other, each with its own buffers: for shared ones the order would decide the result."""
        buffers = [t for t in (running_mean, running_var, tracked) if t is not None]
        if any(dim is None for _, dim in zip(buffers, in_dims, strict=False)):
            raise RuntimeError(
                f"layer {name}: vmap runs several batches at once, and they share running statistics; use "
                "track_running_stats=False, eval(), or buffers with a batch dimension (torch.func.stack_module_state)"
            )
        for i in range(info.batch_size):
            own = [
                t.select(dim, i) if isinstance(t, Tensor) and dim is not None else t
                for t, dim in zip(
                    (running_mean, running_var, tracked, momentum, biased, name, *seen), in_dims, strict=True
                )
            ]
            _Learn.apply(*own)  # type: ignore[no-untyped-call]
        return running_mean.new_empty(0), None
