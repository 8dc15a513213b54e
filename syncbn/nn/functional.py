"""``sync_batch_norm``, and the forward pass that it shares with the layers: chooses how to normalize a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.nn import torch_internals, tracing
from syncbn.nn.autograd import epilogue, on_cpu, operands
from syncbn.nn.autograd.measure import measure
from syncbn.nn.autograd.normalize import normalize, normalize_chunks
from syncbn.nn.comm import all_reduce, groups
from syncbn.nn.kernels import running_statistics
from syncbn.nn.kernels.running_statistics import RunningStatistics


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
    mask: Tensor | None = None,
    biased_running_var: bool = False,
    act: str | None = None,
    residual: Tensor | None = None,
    name: str = "sync_batch_norm",
) -> Tensor:
    """Batch norm with the statistics of the whole group's batch: ``torch.nn.functional.batch_norm`` over devices.

    Ranks may hold batches of different sizes, in samples and in pixels, and empty ones. In training one all-reduce of
    ``2C + 1`` float64 numbers is sent forward (``2C + 2`` on the CPU) and one of ``2C`` backward, if some rank's input
    needs a gradient; in evaluation none. The gradients of ``weight`` and ``bias`` are this rank's share: their
    sum over ranks is the gradient of the whole batch.

    Without a mask this is ``torch.nn.functional.batch_norm``, errors included: in evaluation, and in training where
    no other rank shares the batch and the running variance is the unbiased one.

    Args:
        x: shape ``(N, C)`` or ``(N, C, *)``, float16, bfloat16, float32 or float64; ``N`` may be 0.
        running_mean, running_var: shape ``(C,)`` or None; updated in place in training, with the unbiased variance.
            A batch of ``n = 0`` values over the whole group moves neither; ``n = 1`` leaves the variance.
        weight, bias: shape ``(C,)`` or None.
        training: normalize with the batch's statistics; else with the running ones (or, where those are None, with this
            rank's batch).
        momentum: share of the new value in the running statistics, as torch means it.
        eps: added to the variance.
        group: "world", "node", a number of consecutive ranks, a ProcessGroup, or a DeviceMesh of one dimension (see
            :mod:`syncbn.nn.comm.groups`). For a word or a number the layer makes its own process groups, on all ranks.
        mask: bool, shape that broadcasts to ``x`` without its channels, ``(N, *)``; True counts. Masked positions are
            left out of the statistics, and their outputs and gradients are zero.
        biased_running_var: move ``running_var`` by the variance divided by ``n`` instead of ``n - 1``.
        act: "relu" for ``relu(batch norm + residual)``, None for no activation. While ranks share it costs no pass over
            the data on a GPU.
        residual: shape of ``x``; added before the activation.
        name: what errors call this layer.

    Returns:
        Tensor of the shape, type and memory layout of ``x``.

    Raises:
        ValueError: one value per channel over the whole group in training, on every rank; a group that does not fit the
            world; a parameter or a running statistic that is not of shape ``(C,)``, another activation, a residual of
            another shape than ``x``, before any all-reduce.
        NotImplementedError: an input of another type, as torch raises it.
        RuntimeError: operands of a type that is not floating-point, or on several devices.
    """
    running = RunningStatistics(running_mean, running_var, None, momentum, biased_running_var)
    return forward_pass(
        x,
        running,
        weight,
        bias,
        eps,
        training=training,
        group=groups.parse(group),
        mask=mask,
        act=act,
        residual=residual,
        name=name,
    )


def forward_pass(
    x: Tensor,
    running: RunningStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    training: bool,
    group: groups.GroupSpec,
    ghost_batch: int | None = None,
    mask: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    name: str,
) -> Tensor:
    """Takes every decision of a layer and of :func:`sync_batch_norm`, which document the arguments.

    The order: check the arguments; in evaluation, normalize with the running statistics; in training, normalize ghost
    batches, or call torch's batch norm if no other rank shares the batch, or share the statistics with the other ranks.
    """
    operands.check_input(x, name)
    epilogue.check(x, act, residual)
    if mask is not None:
        mask = operands.over_channels(mask, x)
    if not training and (mask is None or running.mean is not None or running.var is not None):
        kept = x if mask is None else x.masked_fill(~mask, 0)  # masked before too: 0 times a NaN would be NaN
        return epilogue.apply(_torch_in_evaluation(kept, running, weight, bias, eps), act, residual, mask)
    partners = all_reduce.partners(group, name) if training and ghost_batch is None else None
    moving = running if training and not recomputing() else None
    if partners is not None and mask is None and act is None and residual is None:
        normalized = on_cpu.normalize(x, moving, weight, bias, eps, partners, name)
        if normalized is not None:
            return normalized
    operands.check(x, running.mean, running.var, weight, bias, name)
    if training and ghost_batch is not None:
        y, moments = normalize_chunks(x, weight, bias, eps, ghost_batch, mask, running.biased, name)
        if moving is not None:
            running_statistics.learn(moving, moments, name)
        return epilogue.apply(y, act, residual, None if residual is None else mask)
    if partners is None and mask is None and not running.biased and not tracing.transformed():
        return epilogue.apply(_torch_in_training(x, running, weight, bias, eps), act, residual)
    batch = measure(x, partners, mask, name, weight, bias)
    found = None if moving is None else running_statistics.learn(moving, batch.sums, name)
    return normalize(batch, weight, bias, eps, act, residual, found)


def _torch_in_evaluation(
    x: Tensor, running: RunningStatistics, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's batch norm in evaluation: without running statistics it normalizes with the batch's own."""
    without = running.mean is None and running.var is None
    momentum = 0.0 if running.momentum is None else running.momentum
    return F.batch_norm(x, running.mean, running.var, weight, bias, without, momentum, eps)


def _torch_in_training(
    x: Tensor, running: RunningStatistics, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's batch norm in training. An empty batch and a recomputation leave the running statistics alone."""
    mean, var = running.mean, running.var
    if x.numel() and not recomputing():
        momentum = running_statistics.torch_momentum(running)
    else:
        if x.numel() == 0:
            mean, var = (None if buffer is None else buffer.clone() for buffer in (mean, var))
        # Activation checkpointing compares what both passes run and save. So the momentum is zero, and the buffers are
        # passed as in the first pass: neither copies nor None.
        momentum = 0.0
    return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)


def recomputing() -> bool:
    """Whether this forward pass runs within a backward pass: the recomputation of activation checkpointing.

    Always False in code that ``torch.compile`` traces.
    """
    return not torch.compiler.is_compiling() and torch_internals.backward_is_running()
