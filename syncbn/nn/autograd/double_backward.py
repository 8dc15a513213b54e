"""The layer in differentiable operations, for second derivatives, forward mode and transforms of torch.func.

The fused kernels treat the statistics as constants in the backward pass. A second derivative needs them as functions of
the input, all-reduces included: :func:`gradients`, for ``create_graph=True``.

Transforms of ``torch.func`` and forward-mode differentiation cannot see into the fused kernels at all. There the
forward pass consists of differentiable operations too: :func:`differentiable_sums` and :func:`normalize`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.comm import all_reduce
from syncbn.nn.kernels import dispatch
from syncbn.nn.statistics import unpack


def differentiable_sums(
    x: Tensor, mask: Tensor | None, partners: dist.ProcessGroup | None, name: str, refuse_one: str | None
) -> Tensor:
    """``[n, sum x, sum x^2]`` of all that the partners hold, float64, shape ``(2C + 1,)``, differentiable in ``x``.

    One all-reduce, and one more of that size for every derivative.

    Args:
        x: shape ``(N, C, *)``.
        mask: bool, broadcasts to ``x``; or None.
        partners: the ranks that share the batch; None for this rank alone.
        name: what errors call the layer.
        refuse_one: text of the ValueError if ``n`` is 1; None for no check, which on a GPU would wait for the device.
    """
    values = _kept(x, mask)
    if mask is None:
        n = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
    else:
        n = mask.expand_as(x[:, :1]).sum().double().reshape(1)
    local = torch.cat([n, _channel_sum(values), _channel_sum(values.square())])
    place = f"{name} forward, in a transform"
    sums: Tensor = _AllSum.apply(local, partners, place, refuse_one)  # type: ignore[no-untyped-call]
    return sums


def normalize(
    x: Tensor, sums: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the statistics of these sums, differentiable in all."""
    channel = [1, x.shape[1]] + [1] * (x.dim() - 2)
    moments = unpack(sums)
    scale = (moments.var + eps).rsqrt()
    y = (_kept(x, mask) - moments.mean.view(channel)) * (scale if weight is None else scale * weight).view(channel)
    return (y if bias is None else y + bias.view(channel)).to(x.dtype)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """In float64, zero where masked."""
    return x.double() if mask is None else torch.where(mask, x.double(), 0)


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

    Four all-reduces of float64 sums here, and one more each for every further derivative. Shapes and types as in
    :mod:`syncbn.nn.kernels.dispatch`; ``dweight`` and ``dbias`` are this rank's share.
    """
    place = f"{name} backward, to be differentiated"
    dtype = dispatch.statistics_dtype(x)
    channel = [1, x.shape[1]] + [1] * (x.dim() - 2)
    kept = torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else mask.expand_as(x[:, :1])
    n = total(kept.sum().double().reshape(1), partners, place).clamp_min(1)

    def summed(values: Tensor) -> Tensor:
        """Per channel over the group, in float64."""
        return total(_channel_sum(values), partners, place)

    dy, values = (torch.where(kept, t.to(dtype), 0) for t in (dy, x))
    mean = (summed(values) / n).view(channel)
    centred = torch.where(kept, values - mean.to(dtype), 0)
    invstd = (summed(centred.square()) / n + eps).rsqrt().to(dtype).view(channel)
    xhat = centred * invstd
    scale = invstd if weight is None else invstd * weight.to(dtype).view(channel)
    dweight, dbias = _channel_sum(dy * xhat), _channel_sum(dy)
    both = total(torch.cat([dweight, dbias]), partners, place) / n
    mean_dy_xhat, mean_dy = (t.to(dtype).view(channel) for t in both.split(x.shape[1]))
    dx = torch.where(kept, scale * (dy - mean_dy - xhat * mean_dy_xhat), 0)
    return dx.to(x.dtype), dweight, dbias


def parameter_gradients(
    dy: Tensor, x: Tensor, mask: Tensor | None, statistics: dispatch.Statistics, eps: float
) -> tuple[Tensor, Tensor]:
    """``(dweight, dbias)``, differentiable in ``dy``, where no rank's ``x`` needs a gradient; no all-reduce."""
    mean, var, rest = (values.view([1, -1] + [1] * (x.dim() - 2)) for values in statistics.unbind())
    xhat = (x.to(mean.dtype) - mean - rest) * (var + eps).rsqrt()
    dy, xhat = (t if mask is None else torch.where(mask, t, 0) for t in (dy.to(mean.dtype), xhat))
    return _channel_sum(dy * xhat), _channel_sum(dy)


def _channel_sum(values: Tensor) -> Tensor:
    return values.sum(dim=[d for d in range(values.dim()) if d != 1], dtype=torch.float64)


def total(local: Tensor, partners: dist.ProcessGroup | None, place: str) -> Tensor:
    """The sum over ranks, differentiable."""
    if partners is None:
        return local
    summed: Tensor = _AllSum.apply(local, partners, place, None)  # type: ignore[no-untyped-call]
    return summed


def cannot_be_batched(place: str) -> str:
    """The error message for ``is_grads_batched=True`` at a layer that needs an all-reduce."""
    return f"layer {place}: is_grads_batched=True (vectorize=True) cannot all-reduce its batch; use torch.func.jacrev"


class _AllSum(torch.autograd.Function):
    """Sum over ranks; every rank's loss depends on it, so its gradient is the sum over ranks too.

    It has derivatives of any order and mode because the sum is linear. Under ``vmap`` one all-reduce sums all batches.
    """

    @staticmethod
    def forward(x: Tensor, partners: dist.ProcessGroup | None, place: str, refuse_one: str | None) -> Tensor:
        if partners is not None and tracing.batched_by_autograd(x):
            raise RuntimeError(cannot_be_batched(place))
        total = x.clone(memory_format=torch.contiguous_format)
        if partners is not None:
            if tracing.linearizes():
                raise RuntimeError(
                    f"layer {place}: torch.func.linearize cannot trace an all-reduce; use torch.func.jvp"
                )
            total = all_reduce.all_sum(total, partners, place)
        if refuse_one is not None and bool((total[..., 0] == 1).any()):
            raise ValueError(refuse_one)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.partners, ctx.place, _ = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return total(dy.contiguous(), ctx.partners, f"{ctx.place} again"), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return total(dx.contiguous(), ctx.partners, f"{ctx.place}, tangent")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        partners: dist.ProcessGroup | None,
        place: str,
        refuse_one: str | None,
    ) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        if partners is not None:  # gloo aborts the process if the sizes of an all-reduce differ between ranks
            size = float(info.batch_size)
            seen = torch.tensor([size, size * size], dtype=torch.float64, device=x.device)
            sizes, squares = total(seen, partners, f"{place}, size of vmap").tolist()
            if sizes * sizes != squares * partners.size():
                raise RuntimeError(
                    f"layer {place}: vmap runs {info.batch_size} at once here and another number on other ranks; "
                    "give each rank as many"
                )
        batched: Tensor = _AllSum.apply(x.movedim(in_dims[0], 0), partners, place, refuse_one)  # type: ignore[no-untyped-call]
        return batched, 0
