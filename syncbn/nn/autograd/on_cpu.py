"""Fast path on the CPU for layers without mask, residual or activation: one check per direction, then compiled code.

For a small input most of the time is spent in Python. What :mod:`.measure` and :mod:`.normalize` do for every kind of
tensor, mask, activation and tool is done here for the most common layer: no mask, no residual, no activation, nothing
that watches, and all tensors such that compiled code may take them. The results are bitwise the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.autograd import operands
from syncbn.nn.autograd.measure import gradient_need, one_value, some_need_gradient
from syncbn.nn.autograd.normalize import Normalize, anchor_of, as_type
from syncbn.nn.comm import all_reduce, lockstep, observer
from syncbn.nn.kernels import cpu, dispatch, gpu, memory_format, running_statistics
from syncbn.nn.kernels.running_statistics import RunningStatistics

_CPU = torch.device("cpu")


def normalize(
    x: Tensor,
    running: RunningStatistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    partners: dist.ProcessGroup,
    name: str,
) -> Tensor | None:
    """The batch normalized with the statistics of all partners; None, before any all-reduce, if this is not for it.

    Moves ``running``, if given, by the batch.

    Raises:
        ValueError, RuntimeError: as :func:`.measure.measure`.
    """
    if torch.compiler.is_compiling():  # before all else, or a graph would be compiled anew for each observer
        return None
    if gpu.serves(x) or observer.observer is not None or lockstep.enabled():
        return None
    at = cpu.shape(x)
    if at is None or not memory_format.are_plain(weight, bias, device=_CPU, channels=at.c):
        return None
    if not ((weight is None or operands.takes(weight)) and (bias is None or operands.takes(bias))):
        return None
    buffers, share, biased = None, 0.0, False
    if running is not None and (running.mean is not None or running.var is not None):
        buffers = running.buffers
        fixed = running_statistics.fixed_share(running.momentum, running.tracked)
        if buffers is None or fixed is None or not memory_format.are_buffers(*buffers, device=_CPU, channels=at.c):
            return None
        share, biased = fixed, running.biased
    sums = all_reduce.all_sum(cpu.sums(x, at, gradient_need(x)), partners, f"{name} forward")
    shares = some_need_gradient(cpu.number(sums, 2 * at.c + 1), partners, name)
    if at.n * at.s <= 1 and cpu.number(sums, 0) == 1:
        raise ValueError(one_value(x, partners))
    anchor = anchor_of(x, weight, bias) if shares else None
    passed = (at, sums, buffers, share, biased, eps, partners if shares else None, name)
    normalized: Tensor = _OnCPU.apply(x, weight, bias, None, anchor, passed)  # type: ignore[no-untyped-call]
    return normalized


class _OnCPU(Normalize):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        anchor: Tensor | None,
        how: Any,
    ) -> Tensor:
        at, sums, buffers, share, biased, ctx.eps, ctx.partners, ctx.name = how
        y, statistics = cpu.finish(x, at, sums, buffers, share, biased, weight, bias, ctx.eps)
        saved = (x, weight, None, None, statistics)
        ctx.save_for_backward(*saved)
        ctx.kinds, ctx.n = operands.kinds(saved), cpu.number(sums, 0)
        ctx.constant, ctx.rows = ctx.partners is None, at.rows
        ctx.bias_dtype = None if bias is None else bias.dtype
        return dispatch.laid_out(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = operands.restored(ctx.saved_tensors, ctx.kinds, ctx.name)
        x, weight, _, _, statistics = saved
        assert x is not None
        assert statistics is not None
        at = None
        if not torch.is_grad_enabled() and dy.dtype is x.dtype and not tracing.batched_by_autograd(dy):
            at = cpu.shape(x)
        if at is None or not (
            memory_format.are_plain(dy, weight, statistics, device=_CPU) and statistics.is_contiguous()
        ):
            return Normalize.gradients(ctx, saved, dy)
        sums, dbias, dweight = cpu.gradient_sums(dy, x, at, statistics, ctx.eps)
        if ctx.partners is not None:
            sums = all_reduce.all_sum(sums, ctx.partners, f"{ctx.name} backward")
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = None
        if need_x:
            dx = cpu.input_gradient(dy, x, at, ctx.n, statistics, weight, sums, ctx.eps)
            dx = dispatch.laid_out(dx, x)
        return (
            dx,
            as_type(dweight, weight.dtype) if need_weight and weight is not None else None,
            as_type(dbias, ctx.bias_dtype) if need_bias else None,
            None,
            None,
            None,
        )
