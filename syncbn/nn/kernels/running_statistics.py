"""The update of the running statistics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.kernels import cpu, dispatch, gpu
from syncbn.nn.statistics import Moments, known, unpack


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


def learn(running: RunningStatistics, seen: Tensor | Moments, name: str) -> dispatch.Statistics | None:
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
    return _learn(mean, var, tracked, seen, momentum, biased)


def _learn(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    seen: Tensor | Moments,
    momentum: float | None,
    biased: bool,
) -> dispatch.Statistics | None:
    share: float | Tensor = 0.0 if momentum is None else momentum
    if tracked is not None and (momentum is None or isinstance(seen, Moments)):
        tracked.add_(known(seen[0]) > 0)
        if momentum is None:  # a tensor, so that nobody waits for its value
            share = 1 / tracked.clamp_min(1).double()
        tracked = None
    if isinstance(seen, Moments):
        move(running_mean, running_var, seen, share)
        return None
    return update(running_mean, running_var, seen, share, biased, tracked)


def update(
    running_mean: Tensor,
    running_var: Tensor,
    sums: Tensor,
    momentum: float | Tensor,
    biased: bool = False,
    tracked: Tensor | None = None,
) -> dispatch.Statistics | None:
    """:func:`move` by the mean and the variance of the set with these sums, the unbiased one unless ``biased``.

    ``tracked``, a scalar, counts one batch more, unless there are no values.

    Returns:
        The set's statistics, where they came out on the way.
    """
    number = not isinstance(momentum, Tensor)
    if number and gpu.serves(sums) and gpu.takes_running(running_mean, running_var, tracked, sums):
        found = gpu.update_running(running_mean, running_var, tracked, sums, float(momentum), biased)
        return dispatch.Statistics(*found)
    if tracked is not None:
        tracked.add_(known(sums[0]) > 0)
    if not number or not cpu.update_running(running_mean, running_var, sums, float(momentum), biased):
        moments = unpack(sums)
        move(running_mean, running_var, moments if biased else moments.unbiased(), momentum)
    return None


@torch.no_grad()
def move(running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, in place, and in float64.

    Args:
        running_mean, running_var: shape ``(C,)``, any floating type; only the result is rounded to it.
        moments: what to move towards. ``n = 0`` moves neither, ``n = 1`` leaves ``running_var``.
        momentum: a number, or a scalar tensor so that a cumulative average need not wait for the device.
    """
    n = known(moments.n)
    for running, batch, least in ((running_mean, moments.mean, 1), (running_var, moments.var, 2)):
        share = (n >= least).double() * momentum if isinstance(n, Tensor) else (n >= least) * momentum
        running.copy_(torch.lerp(running.double(), batch, share))


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
        _learn(running_mean, running_var, tracked, seen[0] if len(seen) == 1 else Moments(*seen), momentum, biased)
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
        """One after the other. Where the statistics are shared, whose batch came last would count most."""
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
