"""The sums of a batch over all ranks that share it, and whether the backward pass will have an all-reduce too."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.autograd import double_backward
from syncbn.nn.comm import all_reduce, lockstep
from syncbn.nn.comm.observer import active
from syncbn.nn.kernels import dispatch
from syncbn.nn.statistics import may_read

_NO_GRAD = 2.0**20  # what a rank under torch.no_grad() adds to the number of ranks whose input needs a gradient


class Batch(NamedTuple):
    """One rank's share of a batch and the sums of the whole.

    Attributes:
        x: shape ``(N, C, *)``.
        mask: as :func:`.operands.over_channels` returns it, or None.
        partners: the ranks that share the batch, or None for this rank alone.
        name: what errors call the layer.
        sums: ``[n, sum x, sum x^2]`` of all unmasked values of the partners; see
            :mod:`syncbn.nn.statistics`.
        n: the first of them; a number where the host need not wait for it.
        local: this rank's own sums, and intermediate results that the normalization reuses.
        in_transform: whether ``sums`` are differentiable themselves; see :mod:`syncbn.nn.autograd.double_backward`.
        shares_gradient: whether the backward pass has an all-reduce too: some rank's input needs a gradient.
    """

    x: Tensor
    mask: Tensor | None
    partners: dist.ProcessGroup | None
    name: str
    sums: Tensor
    n: Tensor | float
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
    n = dispatch.number(sums, 0, local)
    eager = not torch.compiler.is_compiling()  # torch.compile would turn the condition on the shape into a guard
    if eager and (mask is not None or x.numel() <= x.shape[1]) and _may_read_count(x, mask) and float(n) == 1:
        raise ValueError(one_value(x, partners))
    return Batch(x, mask, partners, name, sums, n, local, shares)


def _measured_in_transform(x: Tensor, partners: dist.ProcessGroup | None, mask: Tensor | None, name: str) -> Batch:
    check = (mask is not None or x.numel() <= x.shape[1]) and (x.is_cpu or mask is None)
    sums = double_backward.differentiable_sums(x, mask, partners, name, one_value(x, partners) if check else None)
    return Batch(x, mask, partners, name, sums, sums[0], dispatch.Local(sums), in_transform=True)


def one_value(x: Tensor, partners: dist.ProcessGroup | None) -> str:
    """The error message for a batch of one value per channel."""
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
    values, grad, trained = x.detach(), torch.is_grad_enabled(), trains(weight, bias)
    shares = grad and (x.requires_grad or trained)  # by this rank's own inputs
    need = gradient_need(x)
    counted = dispatch.carries_need(values)
    local = dispatch.local_sums(values, mask, need)
    payload = local.payload
    if not counted and not trained:  # parameters are alike on all ranks, and so is the length of the all-reduce
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
        shares = some_need_gradient(float(dispatch.number(payload, len(payload) - 1, local)), partners, name)
    return sums, local, shares


def gradient_need(x: Tensor) -> float:
    """What this rank adds to the number of ranks whose input needs a gradient."""
    return float(x.requires_grad) if torch.is_grad_enabled() else _NO_GRAD


def some_need_gradient(needs: float, partners: dist.ProcessGroup, name: str) -> bool:
    """Whether the input of some rank needs a gradient, by the all-reduced count.

    Raises:
        RuntimeError: others run the layer under ``torch.no_grad()``.
    """
    without, with_need = divmod(needs, _NO_GRAD)
    if without and with_need:
        raise RuntimeError(
            f"layer {name}: {without:.0f} of {partners.size()} ranks run it under torch.no_grad(), but its input "
            f"needs a gradient on {with_need:.0f}, which would wait for them; use no_grad() on all ranks or on none"
        )
    return with_need > 0


def _reads_need(x: Tensor, shares: bool) -> bool:
    """Whether this rank reads how many ranks need a gradient: on the CPU always.

    On a GPU the host would wait for it, so only a rank reads it that has no other reason to take part in backward.
    """
    if dispatch.carries_need(x):
        return may_read(x)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return (not shares or lockstep.enabled()) and not capturing and not torch.compiler.is_compiling()


def trains(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a parameter of the layer needs a gradient."""
    return (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)


def _may_read_count(x: Tensor, mask: Tensor | None) -> bool:
    """Whether the host may read how many values there are.

    Not in a CUDA graph, and not for masked batches on a GPU, since each of them would wait for the device. The update
    of the running statistics then leaves the variance alone for a single value.
    """
    return may_read(x) or (mask is None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()))
