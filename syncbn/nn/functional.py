"""The differentiable operation, and the update of the running statistics."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncbn.nn import exchange, groups, kernels, statistics
from syncbn.nn.statistics import Moments


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: object = "world",
) -> Tensor:
    """Batch norm with the statistics of the whole group's batch: ``torch.nn.functional.batch_norm`` over devices.

    Ranks may hold batches of different sizes, in samples and in pixels, and empty ones. In training one all-reduce of
    ``2C + 1`` float64 numbers is sent forward and one of ``2C`` backward; in evaluation nothing is. The gradients of
    ``weight`` and ``bias`` are this rank's share: their sum over ranks is the gradient of the whole batch.

    Args:
        x: shape ``(N, C)`` or ``(N, C, *)``, any floating type; ``N`` may be 0.
        running_mean, running_var: shape ``(C,)`` or None; updated in place in training, with the unbiased variance.
            A batch of ``n = 0`` values over the whole group moves neither; ``n = 1`` leaves the variance.
        weight, bias: shape ``(C,)`` or None.
        training: normalize with the batch's statistics; else with the running ones (or, where those are None, with this
            rank's batch).
        momentum: share of the new value in the running statistics, as torch means it.
        eps: added to the variance.
        group: "world", "node", a number of consecutive ranks, or a ProcessGroup (see :mod:`syncbn.nn.groups`).

    Returns:
        Tensor of the shape, type and memory layout of ``x``.

    Raises:
        ValueError: one value per channel over the whole group in training, on every rank; a group that does not fit the
            world. Without anyone to exchange with, this is ``torch.nn.functional.batch_norm``, errors included.
    """
    spec = groups.parse(group)
    partners = exchange.partners(spec) if training else None
    if partners is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y, moments = normalize_with(partners, x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, moments, momentum)
    return y


def normalize_with(
    partners: dist.ProcessGroup, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """``x`` normalized with the batch statistics of all ``partners``, and those statistics.

    Raises:
        ValueError: torch's own, on every rank, where the whole group holds one value per channel.
    """
    y, *moments = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, eps, partners
    )
    result = Moments(*moments)
    # A rank that holds two values knows that there are two: only the others need look, so full batches never wait.
    # Where looking is impossible the running update leaves the variance alone instead (see update_running).
    if x.numel() <= x.shape[1] and not torch.compiler.is_compiling() and result.n.item() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got 1 on the {partners.size()} ranks together; "
            f"this rank's input size is {x.shape}"
        )
    return y, result


@torch.no_grad()
def update_running(running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, in place, in float64, with the unbiased variance.

    Args:
        running_mean, running_var: shape ``(C,)``, any floating type; only the result is rounded to it.
        moments: of the batch. ``n = 0`` moves neither, ``n = 1`` (no unbiased variance) leaves ``running_var``.
        momentum: a number, or a scalar tensor so that a cumulative average need not wait for the device.
    """
    for running, batch, least in ((running_mean, moments.mean, 1), (running_var, moments.unbiased_var(), 2)):
        share = (moments.n >= least).double() * momentum
        running.copy_((1 - share) * running.double() + share * batch)


class _SyncBatchNorm(torch.autograd.Function):
    """Normalizes with the statistics of a process group; see kernels for the passes and statistics for the sums."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        partners: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        moments = statistics.unpack(exchange.all_sum(kernels.local_sums(x), partners))
        y = kernels.normalize(x, moments, weight, bias, eps)
        ctx.save_for_backward(x, weight, *moments)
        ctx.mark_non_differentiable(*moments)
        ctx.eps, ctx.partners = eps, partners
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, *moments

    @staticmethod
    @once_differentiable  # a second derivative raises; without this it would silently take the statistics for constants
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *moments = ctx.saved_tensors
        moments = Moments(*moments)
        sums = kernels.gradient_sums(dy, x, moments, ctx.eps)
        # Sent whether or not this rank's input needs a gradient: the others may be waiting for it.
        total = exchange.all_sum(sums, ctx.partners)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = kernels.input_gradient(dy, x, moments, weight, total, ctx.eps) if need_x else None
        dbias, dweight = sums.split(x.shape[1])
        return (
            dx,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
        )
