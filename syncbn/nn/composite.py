"""The gradients once more, out of differentiable pieces: slower, and right under ``create_graph=True``.

The fused kernels take the statistics for constants of the backward pass. Their derivative is not zero, so a second
derivative needs them as functions of the input, messages included.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn import exchange, kernels


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    eps: float,
    partners: dist.ProcessGroup | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dweight, dbias)``, differentiable in ``dy``, ``x`` and ``weight``, across all ``partners``.

    Four messages of float64 sums here, and one more each for every further derivative. Shapes and types as in
    :mod:`syncbn.nn.kernels`; ``dweight`` and ``dbias`` are this rank's share.
    """
    place = f"{name} backward, to be differentiated"
    dtype = kernels.statistics_dtype(x)
    channel = [1, x.shape[1]] + [1] * (x.dim() - 2)
    kept = torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else mask.expand_as(x[:, :1])
    n = _total(kept.sum().double().reshape(1), partners, place).clamp_min(1)

    def total(values: Tensor) -> Tensor:
        """Sum per channel over the group, in float64."""
        return _total(_channel_sum(values), partners, place)

    dy, values = (torch.where(kept, t.to(dtype), 0) for t in (dy, x))
    mean = (total(values) / n).view(channel)
    centred = torch.where(kept, values - mean.to(dtype), 0)
    invstd = (total(centred.square()) / n + eps).rsqrt().to(dtype).view(channel)
    xhat = centred * invstd
    scale = invstd if weight is None else invstd * weight.to(dtype).view(channel)
    dweight, dbias = _channel_sum(dy * xhat), _channel_sum(dy)
    both = _total(torch.cat([dweight, dbias]), partners, place) / n
    mean_dy_xhat, mean_dy = (t.to(dtype).view(channel) for t in both.split(x.shape[1]))
    dx = torch.where(kept, scale * (dy - mean_dy - xhat * mean_dy_xhat), 0)
    return dx.to(x.dtype), dweight, dbias


def parameter_gradients(
    dy: Tensor, x: Tensor, mask: Tensor | None, statistics: kernels.Statistics, eps: float
) -> tuple[Tensor, Tensor]:
    """``(dweight, dbias)``, differentiable in ``dy``, where no rank's ``x`` needs a gradient; nothing is sent."""
    mean, var, rest = (values.view([1, -1] + [1] * (x.dim() - 2)) for values in statistics)
    xhat = (x.to(mean.dtype) - mean - rest) * (var + eps).rsqrt()
    dy, xhat = (t if mask is None else torch.where(mask, t, 0) for t in (dy.to(mean.dtype), xhat))
    return _channel_sum(dy * xhat), _channel_sum(dy)


def _channel_sum(values: Tensor) -> Tensor:
    return values.sum(dim=[d for d in range(values.dim()) if d != 1], dtype=torch.float64)


def _total(local: Tensor, partners: dist.ProcessGroup | None, place: str) -> Tensor:
    if partners is None:
        return local
    total: Tensor = _AllSum.apply(local, partners, place)  # type: ignore[no-untyped-call]
    return total


class _AllSum(torch.autograd.Function):
    """Sum over ranks; every rank's loss depends on it, so its gradient is the sum over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, partners: dist.ProcessGroup, place: str) -> Tensor:
        ctx.partners, ctx.place = partners, place
        return exchange.all_sum(x.clone(), partners, place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _total(dy.contiguous(), ctx.partners, f"{ctx.place} again"), None, None
