"""``sync_batch_norm``, the forward pass that it shares with the layers, and the autograd function behind both."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncbn.nn import double_backward, epilogue, operands, torch_internals, tracing
from syncbn.nn.comm import all_reduce, groups, lockstep
from syncbn.nn.comm.observer import active
from syncbn.nn.kernels import dispatch, running_statistics
from syncbn.nn.kernels.running_statistics import RunningStatistics
from syncbn.nn.statistics import Moments, may_read

# An input that needs a gradient. It makes autograd run the backward pass, and so its all-reduce, on a rank of which no
# other input needs one: the ranks that need one would wait for it.
_ANCHOR = torch.empty(0, requires_grad=True)
_NO_GRAD = 2.0**20  # what a rank under torch.no_grad() adds to the number of ranks whose input needs a gradient


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

        Without a mask this is ``torch.nn.functional.batch_norm``, errors included: in evaluation, and in training where
        no other rank shares the batch and the running variance is the unbiased one.
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
        mask = over_channels(mask, x)
    if not training and (mask is None or running.mean is not None or running.var is not None):
        kept = x if mask is None else x.masked_fill(~mask, 0)  # masked before too: 0 times a NaN would be NaN
        return epilogue.apply(_torch_in_evaluation(kept, running, weight, bias, eps), act, residual, mask)
    operands.check(x, running.mean, running.var, weight, bias, name)
    if training and ghost_batch is not None:
        y, moments = normalize_chunks(x, weight, bias, eps, ghost_batch, mask, running.biased, name)
        if not recomputing():
            running_statistics.learn(running, moments, name)
        return epilogue.apply(y, act, residual, None if residual is None else mask)
    partners = all_reduce.partners(group, name) if training else None
    if partners is None and mask is None and not running.biased and not tracing.transformed():
        return epilogue.apply(_torch_in_training(x, running, weight, bias, eps), act, residual)
    batch = measure(x, partners, mask, name, weight, bias)
    found = running_statistics.learn(running, batch.sums, name) if training and not recomputing() else None
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


class Batch(NamedTuple):
    """One rank's share of a batch and the sums of the whole.

    Attributes:
        x: shape ``(N, C, *)``.
        mask: as :func:`over_channels` returns it, or None.
        partners: the ranks that share the batch, or None for this rank alone.
        name: what errors call the layer.
        sums: ``[n, sum x, sum x^2]`` of all unmasked values of the partners; see
            :mod:`syncbn.nn.statistics`.
        local: this rank's own sums, and intermediate results that the normalization reuses.
        in_transform: whether ``sums`` are differentiable themselves; see :mod:`syncbn.nn.double_backward`.
        shares_gradient: whether the backward pass has an all-reduce too: some rank's input needs a gradient.
    """

    x: Tensor
    mask: Tensor | None
    partners: dist.ProcessGroup | None
    name: str
    sums: Tensor
    local: dispatch.Local
    shares_gradient: bool = False
    in_transform: bool = False


def measure(
    x: Tensor,
    partners: dist.ProcessGroup | None,
    mask: Tensor | None = None,
    name: str = "sync_batch_norm",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Batch:
    """The sums of the batch that all ``partners`` hold together; see :class:`Batch` for the arguments.

    Only the gradient of ``x`` needs other ranks, so there is an all-reduce in the backward pass if the ``x`` of one of
    them needs a gradient. The forward all-reduce counts these ranks: on the CPU always, on a GPU if ``weight`` and
    ``bias`` are frozen or None, where only a rank that needs no gradient waits to read the count. In a compiled graph
    or a CUDA graph it cannot be read, and each rank decides by its own inputs.

    Raises:
        NotImplementedError: a sparse or MKL-DNN input.
        ValueError: torch's own, on every rank, where the whole group holds one value per channel.
        RuntimeError: on every rank, where one is under ``torch.no_grad()`` and the input of another needs a gradient.
    """
    if x.layout is not torch.strided:
        raise NotImplementedError(f"layer {name}: the input has layout {x.layout}; use x.to_dense()")
    if tracing.transformed():
        return _measured_in_transform(x, partners, mask, name)
    if partners is None:
        local = dispatch.local_sums(x.detach(), mask)
        sums, shares = local.sums, False
    else:
        sums, local, shares = _all_reduced(x, partners, mask, name, weight, bias)
    # A rank with two values need not check the count, so full batches never wait for it.
    eager = not torch.compiler.is_compiling()  # torch.compile would turn the condition on the shape into a guard
    if eager and (mask is not None or x.numel() <= x.shape[1]) and _may_read_count(x, mask) and sums[0].item() == 1:
        raise ValueError(_one_value(x, partners))
    return Batch(x, mask, partners, name, sums, local, shares)


def _measured_in_transform(x: Tensor, partners: dist.ProcessGroup | None, mask: Tensor | None, name: str) -> Batch:
    check = (mask is not None or x.numel() <= x.shape[1]) and (x.is_cpu or mask is None)
    sums = double_backward.measure(x, mask, partners, name, _one_value(x, partners) if check else None)
    return Batch(x, mask, partners, name, sums, dispatch.Local(sums), in_transform=True)


def _one_value(x: Tensor, partners: dist.ProcessGroup | None) -> str:
    ranks = 1 if partners is None else partners.size()
    return (
        f"Expected more than 1 value per channel when training, got 1 on the {ranks} ranks together; "
        f"this rank's input size is {x.shape}"
    )


def _all_reduced(
    x: Tensor,
    partners: dist.ProcessGroup,
    mask: Tensor | None,
    name: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, dispatch.Local, bool]:
    """The group's sums, this rank's own, and whether the backward pass has an all-reduce too."""
    values, grad, trains = x.detach(), torch.is_grad_enabled(), _trains(weight, bias)
    shares = grad and (x.requires_grad or trains)  # by this rank's own inputs
    need = float(x.requires_grad) if grad else _NO_GRAD
    counted = dispatch.carries_need(values)
    local = dispatch.local_sums(values, mask, need)
    payload = local.payload
    if not counted and not trains:  # parameters are alike on all ranks, and so is the length of the all-reduce
        payload, counted = torch.cat([payload, payload.new_full((1,), need)]), True
    reads = counted and _reads_need(values, shares)
    observer = active()
    own = None if observer is None else local.sums.clone()  # the all-reduce overwrites them
    place = f"{name} forward"
    if not reads and lockstep.enabled():  # debug mode compares places, so it names ranks that decide otherwise
        place += ", with a backward message to come" if shares else ", with no backward message to come"
    payload = all_reduce.all_sum(payload, partners, place)
    sums = payload[:-1] if counted else payload
    if observer is not None and own is not None:
        observer.measured(name, own, sums)
    if reads:
        without, with_need = divmod(payload[-1].item(), _NO_GRAD)
        shares = with_need > 0
        if without and shares:
            raise RuntimeError(
                f"layer {name}: {without:.0f} of {partners.size()} ranks run it under torch.no_grad(), but its input "
                f"needs a gradient on {with_need:.0f}, which would wait for them; use no_grad() on all ranks or on none"
            )
    return sums, local, shares


def _reads_need(x: Tensor, shares: bool) -> bool:
    """Whether this rank reads how many ranks need a gradient: on the CPU always.

    On a GPU the host would wait for it, so only a rank reads it that has no other reason to take part in backward.
    """
    if dispatch.carries_need(x):
        return may_read(x)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return (not shares or lockstep.enabled()) and not capturing and not torch.compiler.is_compiling()


def _trains(weight: Tensor | None, bias: Tensor | None) -> bool:
    return (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)


def _may_read_count(x: Tensor, mask: Tensor | None) -> bool:
    """Whether the host may read how many values there are.

    Not in a CUDA graph, and not for masked batches on a GPU, since each of them would wait for the device. The update
    of the running statistics then leaves the variance alone for a single value.
    """
    return may_read(x) or (mask is None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()))


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
    # This rank takes part in the backward all-reduce even if none of its own tensors needs a gradient.
    anchor = None
    if batch.shares_gradient and not batch.x.requires_grad and not _trains(weight, bias):
        anchor = _ANCHOR
    inputs = (batch.x, weight, bias, residual, eps, batch, found, act == "relu", anchor)
    normalized: Tensor = _Normalize.apply(*inputs)  # type: ignore[no-untyped-call]
    return normalized


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


def recomputing() -> bool:
    """Whether this forward pass runs within a backward pass: the recomputation of activation checkpointing.

    Always False in code that ``torch.compile`` traces.
    """
    return not torch.compiler.is_compiling() and torch_internals.backward_is_running()


class _Normalize(torch.autograd.Function):
    """Normalizes with given statistics; its gradient accounts for their dependence on the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        batch: Batch,
        found: dispatch.Statistics | None,
        relu: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        if found is None or dispatch.statistics_dtype(x) != found.mean.dtype:
            found = dispatch.rounded(batch.sums, x, batch.local)
        # dispatch.normalize may overwrite local.shifted and return it. A compiled graph would then return one of its
        # inputs, and an in-place activation after the layer would be refused.
        local = None if torch.compiler.is_compiling() else batch.local
        y, passed = dispatch.normalize(x, found, weight, bias, eps, local, residual, relu)
        if batch.mask is not None:
            y.masked_fill_(~batch.mask, 0)
        gate = (bias if passed is None else None, passed) if relu else ()
        saved = (x, weight, batch.mask, batch.sums[0], *found, *gate)
        ctx.save_for_backward(*saved)
        ctx.kinds = None if torch.compiler.is_compiling() else operands.kinds(saved)
        ctx.eps, ctx.name, ctx.dtype = eps, batch.name, x.dtype
        ctx.partners = batch.partners if batch.shares_gradient else None
        ctx.constant = batch.partners is not None and not batch.shares_gradient
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.rows = local is not None and local.at is not None and bool(local.at.rows)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.kinds is not None:
            saved = operands.restored(saved, ctx.kinds, ctx.name)
        x, weight, mask, n, mean, var, rest, *gate = saved
        if ctx.partners is not None and tracing.batched_by_autograd(dy):
            raise RuntimeError(double_backward.cannot_be_batched(ctx.name))
        statistics = dispatch.Statistics(mean.contiguous(), var.contiguous(), rest.contiguous())
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
            dx.to(ctx.dtype) if need_x and dx is not None else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            dresidual.to(ctx.dtype) if dresidual is not None and need_residual else None,
            *([None] * 5),
        )


def over_channels(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` as a tensor that broadcasts to ``x``, channels included, and has its number of dimensions.

    Raises:
        TypeError: another type than bool.
        ValueError: another device; a shape that does not broadcast to ``x`` without its channels.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True counts), got {mask.dtype}")
    without_channels = (x.shape[0], *x.shape[2:])
    if mask.device != x.device:
        raise ValueError(f"the mask is on {mask.device}, but the input on {x.device}: move it there")
    try:
        return mask.expand(without_channels).unsqueeze(1)
    except RuntimeError:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to {without_channels}, the input less its channels"
        ) from None
