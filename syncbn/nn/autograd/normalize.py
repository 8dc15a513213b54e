"""Normalizes a batch with its statistics, at once or in ghost batches; and the autograd function that does so."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.autograd import double_backward, epilogue, operands
from syncbn.nn.autograd.measure import Batch, measure, trains
from syncbn.nn.comm import all_reduce
from syncbn.nn.kernels import dispatch, running_statistics
from syncbn.nn.statistics import Moments

# An input that needs a gradient. Without it a rank whose own inputs need none would skip the backward pass and its
# all-reduce, and the other ranks would wait for it.
_ANCHOR = torch.empty(0, requires_grad=True)


def normalize(
    batch: Batch,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    residual: Tensor | None = None,
    found: dispatch.Statistics | None = None,
) -> Tensor:
    """The batch normalized with its statistics, then :func:`.epilogue.apply`; differentiable.

    Overwrites ``batch.local``. ``found`` are the statistics, if :func:`.running_statistics.learn` has returned them.
    """
    if batch.in_transform:
        y = double_backward.normalize(batch.x, batch.sums, weight, bias, batch.mask, eps)
        return epilogue.apply(y, act, residual, batch.mask)
    if residual is not None and residual.dtype != batch.x.dtype:  # torch's type promotion decides the result's type
        return epilogue.apply(normalize(batch, weight, bias, eps, found=found), act, residual, batch.mask)
    anchor = anchor_of(batch.x, weight, bias) if batch.shares_gradient else None
    how = _How(batch, eps, found, act == "relu")
    normalized: Tensor = Normalize.apply(batch.x, weight, bias, residual, anchor, how)  # type: ignore[no-untyped-call]
    return normalized


def anchor_of(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """An input that makes autograd run the backward pass on a rank none of whose own tensors needs a gradient."""
    return None if x.requires_grad or trains(weight, bias) else _ANCHOR


def normalize_chunks(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    chunk: int,
    mask: Tensor | None = None,
    biased: bool = False,
    name: str = "sync_batch_norm",
) -> tuple[Tensor, Moments]:
    """Ghost batches: ``x`` normalized ``chunk`` samples at a time, and the means over the chunks of their moments.

    A rest of fewer than ``chunk`` samples joins the chunk before; a fully masked chunk has no moments. The variances
    are the unbiased ones unless ``biased``. No all-reduce.
    """
    sizes = [chunk] * max(len(x) // chunk, 1)
    sizes[-1] += len(x) - sum(sizes)
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    batches = [measure(part, None, kept, name) for part, kept in zip(x.split(sizes), masks, strict=True)]
    moments = [running_statistics.target(batch.sums, biased) for batch in batches]
    n, mean, var = map(torch.stack, zip(*moments, strict=True))
    counts = (n > 0).double()
    share = counts / counts.sum().clamp_min(1)
    y = torch.cat([normalize(batch, weight, bias, eps) for batch in batches])
    return y, Moments(n.sum(), share @ mean, share @ var)


class _How(NamedTuple):
    """Arguments of :class:`Normalize` that are not inputs of the graph; as one object, since each costs it time."""

    batch: Batch
    eps: float
    found: dispatch.Statistics | None
    relu: bool


class Normalize(torch.autograd.Function):
    """Normalizes with given statistics; its gradient accounts for their dependence on the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        anchor: Tensor | None,
        how: _How,
    ) -> Tensor:
        batch, eps, found, relu = how
        if found is None or dispatch.statistics_dtype(x) != found.dtype:
            found = dispatch.rounded(batch.sums, x, batch.local)
        # dispatch.normalize may overwrite local.shifted and return it. A compiled graph would then return one of its
        # inputs, and an in-place activation after the layer would be refused.
        compiling = torch.compiler.is_compiling()
        local = None if compiling else batch.local
        y, passed = dispatch.normalize(x, found, weight, bias, eps, local, residual, relu)
        if batch.mask is not None:
            y.masked_fill_(~batch.mask, 0)
        gate = (bias if passed is None else None, passed) if relu else ()
        n = batch.n if isinstance(batch.n, Tensor) else None
        saved = (x, weight, batch.mask, n, found, *gate)
        ctx.save_for_backward(*saved)
        ctx.kinds = None if compiling else operands.kinds(saved)
        ctx.eps, ctx.name, ctx.n = eps, batch.name, None if n is not None else batch.n
        ctx.partners = batch.partners if batch.shares_gradient else None
        ctx.constant = batch.partners is not None and not batch.shares_gradient
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.rows = local is not None and local.at is not None and bool(local.at.rows)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return Normalize.gradients(
            ctx, saved if ctx.kinds is None else operands.restored(saved, ctx.kinds, ctx.name), dy
        )

    @staticmethod
    def gradients(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Tensor | None, ...]:
        """Those of the inputs, from what forward has saved."""
        x, weight, mask, n, statistics, *gate = saved
        if ctx.partners is not None and tracing.batched_by_autograd(dy):
            raise RuntimeError(double_backward.cannot_be_batched(ctx.name))
        n = ctx.n if n is None else n
        statistics = statistics.contiguous()
        need_x, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        relu = dispatch.Relu(gate[0], gate[1], ctx.rows) if gate else None
        dx: Tensor | None
        dresidual: Tensor | None
        # With create_graph=True the statistics must be functions of x, not constants. Batched gradients
        # (vectorize=True) have no memory that a kernel could read.
        if torch.is_grad_enabled() or tracing.transformed() or tracing.batched_by_autograd(dy):
            dy = dispatch.relu_gradient(dy, x, statistics, weight, ctx.eps, relu)
            dresidual = dy if mask is None else dy.masked_fill(~mask, 0)
            if ctx.constant:
                dx, (dweight, dbias) = None, double_backward.parameter_gradients(dy, x, mask, statistics, ctx.eps)
            else:
                dx, dweight, dbias = double_backward.gradients(dy, x, weight, mask, ctx.eps, ctx.partners, ctx.name)
        else:
            data = dispatch.pair(x, dy, mask, statistics, weight, ctx.eps, relu, n)
            sums, dbias, dweight = dispatch.gradient_sums(data, statistics, weight, ctx.eps)
            if ctx.partners is not None:
                sums = all_reduce.all_sum(sums, ctx.partners, f"{ctx.name} backward")
            dx, dresidual = None, data.dy
            if need_x or (need_residual and data.relu is not None):
                dx, dresidual = dispatch.input_gradient(data, n, statistics, weight, sums, ctx.eps, need_residual)
            if mask is not None and dx is not None:
                dx.masked_fill_(~mask, 0)
        return (
            as_type(dx, x.dtype) if need_x else None,
            as_type(dweight, weight.dtype) if need_weight else None,
            as_type(dbias, ctx.bias_dtype) if need_bias else None,
            as_type(dresidual, x.dtype) if need_residual else None,
            None,
            None,
        )


def as_type(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``t`` in this type, without a call of torch if it has it."""
    return t if t is None or t.dtype is dtype else t.to(dtype)
