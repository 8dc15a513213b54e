"""The update of the running statistics."""

import torch
from torch import Tensor

from syncbn.nn import gpu, kernels, native
from syncbn.nn.statistics import Moments, known, unpack


def update(
    running_mean: Tensor,
    running_var: Tensor,
    sums: Tensor,
    momentum: float | Tensor,
    biased: bool = False,
    tracked: Tensor | None = None,
) -> kernels.Statistics | None:
    """:func:`move` by the mean and the variance of the set with these sums, the unbiased one unless ``biased``.

    ``tracked``, a scalar, counts one batch more, unless there are no values.

    Returns:
        The set's statistics, where they came out on the way.
    """
    number = not isinstance(momentum, Tensor)
    if number and gpu.serves(sums) and gpu.takes_running(running_mean, running_var, tracked, sums):
        found = gpu.update_running(running_mean, running_var, tracked, sums, float(momentum), biased)
        return kernels.Statistics(*found)
    if tracked is not None:
        tracked.add_(known(sums[0]) > 0)
    if not number or not native.update_running(running_mean, running_var, sums, float(momentum), biased):
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
