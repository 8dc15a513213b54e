"""The passes over the data, on one device.

Every function takes ``x`` of shape ``(N, C, *)`` in any floating type and any memory layout. Sums over the data are
handed on in float64, and never taken in half precision.

On the CPU :mod:`syncbn.nn.kernels.cpu` does most of it, on a GPU :mod:`syncbn.nn.kernels.gpu`. The rest is put together
from torch's own kernels, the same calls on the CPU and on CUDA, and on CUDA none reads a value back to the host.
``native_batch_norm_backward`` in evaluation mode with the output mask ``[False, True, True]`` is a fused reduction that
gives ``sum dy*(x - mean)`` and ``sum dy``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.nn.kernels import cpu, gpu, memory_format, triton_tiling
from syncbn.nn.statistics import known, may_read, unpack


class Local(NamedTuple):
    """What one device knows of its values.

    Attributes:
        message: what an exchange sends: the sums, and where :func:`carries_need` says so ``need`` after them.
        at: how ``x`` lies in memory, where compiled code takes it.
        shift: the values' mean but for its rounding, shape ``(C,)``; None where they were not centred.
        shifted: ``x - shift``, a new tensor of the shape of ``x``; None where ``shift`` is.
    """

    message: Tensor
    at: cpu.Shape | triton_tiling.Shape | None = None
    shift: Tensor | None = None
    shifted: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """``[n, sum x, sum x^2]`` per channel: float64, shape ``(2C + 1,)``; a view of the message."""
        return sums_of(self.message)


class Statistics(NamedTuple):
    """What the passes over the data normalize with, in the type that they compute in.

    Attributes:
        mean, var: shape ``(C,)``.
        rest: what ``mean`` lost in rounding, shape ``(C,)``.
    """

    mean: Tensor
    var: Tensor
    rest: Tensor


class Relu(NamedTuple):
    """What the backward passes know of a ReLU that followed.

    Attributes:
        bias: of the batch norm before it, or None.
        passed: where it let through: its output, shape ``(N, C, *)``; or :mod:`syncbn.nn.kernels.gpu`'s bits; or None
            where that follows from the input alone.
        rows: how the input of which these are the bits lay in memory (see :class:`.triton_tiling.Shape`).
            Hooks on saved tensors may return it with another layout.
    """

    bias: Tensor | None
    passed: Tensor | None
    rows: bool

    @property
    def gate(self) -> tuple[Tensor | None, Tensor | None]:
        """What :mod:`syncbn.nn.kernels.gpu` takes."""
        return self.bias, self.passed


class Pair(NamedTuple):
    """An input and the gradient of its output, as the backward passes take them: of one type, and blank where masked.

    Attributes:
        x, dy: shape ``(N, C, *)``; float32 or float64, and where compiled code takes them float16 or bfloat16.
        at: how ``x`` lies in memory, where compiled code takes both.
        relu: what ``dy`` has yet to go through; the passes of :mod:`syncbn.nn.kernels.gpu` do that on their way.
    """

    x: Tensor
    dy: Tensor
    at: cpu.Shape | triton_tiling.Shape | None
    relu: Relu | None = None


def carries_need(x: Tensor) -> bool:
    """Whether a message about ``x`` ends with one number more, ``need``: on the CPU, where reading it is free."""
    return x.is_cpu and not gpu.serves(x)


def sums_of(message: Tensor) -> Tensor:
    """The sums in a message, with or without a number after them."""
    return message[: len(message) - 1 | 1]


def local_sums(x: Tensor, mask: Tensor | None = None, need: float = 0.0) -> Local:
    """The sums of this device's values, to the digits of their type whatever their offset and count.

    With torch's kernels values are centred on their mean before they are squared, and what that mean lost in rounding
    is carried along. An empty ``x`` gives zeros.

    Args:
        x: shape ``(N, C, *)``.
        mask: bool, broadcasts to ``x``; only where it is True does a value count.
        need: the number after the sums; see :func:`carries_need`.
    """
    channels = x.shape[1]
    if x.numel() == 0:  # a shape, not a value: no wait; and torch's reduction kernel divides by zero on an empty tensor
        zeros = _nothing(x).repeat(3)[channels - 1 :]
        return Local(torch.cat([zeros, zeros[:1] + need]) if carries_need(x) else zeros)
    values, at = blank(x, mask), _shape(x)
    if mask is not None and isinstance(
        at, triton_tiling.Shape
    ):  # it sums float32 distances from the mean, blanks included
        at = None
    n = None if mask is None else mask.expand_as(x[:, :1]).sum().double().reshape(1)
    if at is not None:
        message = gpu.sums(values, at) if isinstance(at, triton_tiling.Shape) else cpu.sums(values, at, need)
        if n is not None:
            message[:1] = n
        return Local(message, at)
    # The number itself where it is known, and its tensor in the message alone: inductor would have one constant for
    # all layers of that size, keep it in the first one's message, and read from there what ranks have added up.
    number = x.numel() // channels
    count = number if n is None else n.clamp_min(1)
    values = values.to(statistics_dtype(x))
    shift = (values.sum(dim=[d for d in range(x.dim()) if d != 1]) / count).to(values.dtype)
    shifted = values - _per_channel(shift, x)
    if mask is not None:
        shifted.masked_fill_(~mask, 0)
    remainder, squares = _sums(shifted, shifted).split(channels)
    mean = shift.double()
    total = (number if n is None else n) * mean + remainder
    if n is None:
        n = torch.full((1,), number, dtype=torch.float64, device=x.device)
    parts = [n, total, squares + mean * (remainder + total)]
    if carries_need(x):
        parts.append(torch.full((1,), need, dtype=torch.float64, device=x.device))
    return Local(torch.cat(parts), None, shift, shifted)


def rounded(sums: Tensor, x: Tensor, local: Local) -> Statistics:
    """The statistics of the set with these sums, in the type that the passes over ``x`` compute in."""
    dtype = statistics_dtype(x)
    if isinstance(local.at, triton_tiling.Shape):
        return Statistics(*gpu.statistics(sums))
    if dtype == torch.float32 and cpu.takes(sums):
        return Statistics(*cpu.statistics(sums))
    moments = unpack(sums)
    mean = moments.mean.to(dtype)
    return Statistics(mean, moments.var.to(dtype), (moments.mean - mean).to(dtype))


def normalize(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    local: Local | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, plus ``residual``, through a ReLU, as asked.

    Returns:
        That, in the type and layout of ``x``, and ``passed`` of :class:`Relu`. ``local.shifted`` is used up.
    """
    at = None if local is None else local.at
    if at is not None and _as_memory(x, weight, bias) and memory_format.are_plain(residual, device=x.device):
        if isinstance(at, triton_tiling.Shape):
            y, bits = gpu.normalize(x, at, statistics, weight, bias, eps, residual, relu)
            return _laid_out(y, x), bits
        y = _laid_out(cpu.normalize(x, at, statistics, weight, bias, eps, residual, relu), x)
        return y, y if relu else None
    values = _affine(x, statistics, weight, bias, eps, local)
    if residual is not None:
        values.add_(residual)
    y = _laid_out((values.relu_() if relu else values).to(x.dtype), x)
    return y, y if relu else None


def let_through(
    dy: Tensor, x: Tensor, statistics: Statistics, weight: Tensor | None, eps: float, relu: Relu | None
) -> Tensor:
    """The gradient of what went into the ReLU from that of what came out; differentiable in ``dy``."""
    if relu is None:
        return dy
    passed = relu.passed
    if passed is not None and passed.dtype != torch.uint8:
        gated: Tensor = torch.ops.aten.threshold_backward(dy, passed, 0)
        return gated
    closed = (
        _affine(x, statistics, weight, relu.bias, eps) <= 0 if passed is None else ~gpu.unpacked(passed, x, relu.rows)
    )
    return torch.where(closed, 0, dy)


def pair(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    statistics: Statistics,
    weight: Tensor | None,
    eps: float,
    relu: Relu | None = None,
    n: Tensor | None = None,
) -> Pair:
    """Both as the backward passes take them. All else that :func:`input_gradient` will take is checked here too."""
    bias, passed = (None, None) if relu is None else relu.gate
    bits = passed is not None and passed.dtype == torch.uint8
    if relu is not None and passed is not None and bits:
        relu = relu._replace(passed=passed.contiguous())
        x = memory_format.ordered(x, relu.rows)
    at = None if x.numel() == 0 or dy.dtype != x.dtype else _shape(x)
    if at is not None and not (
        memory_format.are_plain(dy, n, passed, device=x.device) and _as_memory(x, weight, bias, *statistics)
    ):
        at = None
    # What torch's kernels, or those of the CPU, have let through forward is known by their output alone.
    if not (isinstance(at, triton_tiling.Shape) and relu is not None and (bits or relu.passed is None)):
        dy, relu = let_through(dy, x, statistics, weight, eps, relu), None
    x, dy = blank(x, mask), blank(dy, mask)
    if at is None:
        x, dy = (t.to(statistics_dtype(x)) for t in (x, dy))
    return Pair(x, dy, at, relu)


def gradient_sums(
    data: Pair, statistics: Statistics, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``[sum dy, sum dy*xhat]`` of this device's values, per channel: float64, shape ``(2C,)``; and each by itself."""
    x, dy, at, relu = data
    if isinstance(at, triton_tiling.Shape):
        return gpu.gradient_sums(dy, x, at, statistics, weight, eps, None if relu is None else relu.gate)
    if at is not None:
        return cpu.gradient_sums(dy, x, at, statistics, eps)
    if x.numel() == 0:
        sums = _nothing(dy).repeat(2)
    else:
        mean, var, rest = statistics
        sums = _sums(dy, x, mean, var, eps)
        total, weighted = sums.split(len(mean))
        weighted.addcmul_(rest * (var + eps).rsqrt(), total, value=-1)
    total, weighted = sums.clone().split(x.shape[1])
    return sums, total, weighted


def input_gradient(
    data: Pair,
    n: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    sums: Tensor,
    eps: float,
    of_residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, in its layout, from ``gradient_sums`` added up over the group; and that of a residual,
    where asked for.

    ``dx = weight * invstd * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n)`` (Ioffe & Szegedy 2015, section 3, with the
    sums taken over every device that shared the statistics).
    """
    x, dy, at, relu = data
    if isinstance(at, triton_tiling.Shape):
        gate = None if relu is None else relu.gate
        dx, dresidual = gpu.input_gradient(dy, x, at, n, statistics, weight, sums, eps, gate, of_residual)
        return _laid_out(dx, x), dy if dresidual is None else _laid_out(dresidual, x)
    if at is not None:
        return _laid_out(cpu.input_gradient(dy, x, at, n, statistics, weight, sums, eps), x), dy
    scale = (statistics.var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset, slope = (sums.view(2, -1) * (scale / -known(n))).to(x.dtype).unbind()
    # xhat * slope + offset, then dy on top in place: two passes, one new tensor.
    xhat = _affine(x, statistics, slope, offset, eps)
    return _laid_out(xhat.addcmul_(dy, _per_channel(scale, x)), x), dy


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros where ``mask`` is False, in its layout."""
    return x if mask is None else x.clone().masked_fill_(~mask, 0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type in which values of ``x`` are summed: never half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shape(x: Tensor) -> cpu.Shape | triton_tiling.Shape | None:
    """How ``x`` lies in memory, for whoever takes it there."""
    return gpu.shape(x) if gpu.serves(x) else cpu.shape(x)


def _as_memory(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether compiled code that takes ``x`` takes these, one a channel, too."""
    return memory_format.are_plain(*parameters, device=x.device, channels=x.shape[1])


def _affine(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    local: Local | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, new, in the type that computes; uses up ``local.shifted``."""
    mean, var, rest = statistics
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(mean.dtype)
    if local is None or local.shift is None or local.shifted is None:
        shifted, by = x - _per_channel(mean, x), rest
    else:
        shifted, by = local.shifted, mean - local.shift + rest
    shifted.sub_(_per_channel(by, x)).mul_(_per_channel(scale, x))
    if bias is not None:
        shifted.add_(_per_channel(bias, x))
    return shifted


def _sums(dy: Tensor, x: Tensor, mean: Tensor | None = None, var: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """``[sum dy, sum dy*(x - mean)/sqrt(var + eps)]`` per channel: float64, shape ``(2C,)``; mean 0 and variance 1."""
    if may_read(x) and not x.is_contiguous():  # the CPU's kernel adds row to row, in float32: 1.6 million rows are 1e-3
        dy, x = dy.contiguous(), x.contiguous()
    if mean is None or var is None:
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    mask = [False, True, True]
    _, weighted, total = torch.ops.aten.native_batch_norm_backward(dy, x, None, mean, var, None, None, False, eps, mask)
    return torch.cat([total, weighted]).double()


def _laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the layout that torch's batch norm gives for ``x``: channels_last stays, all else is contiguous."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return y.contiguous(memory_format=layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` of shape ``(C,)`` so that they broadcast to ``x``."""
    return values.view([1, -1] + [1] * (x.dim() - 2))


def _nothing(x: Tensor) -> Tensor:
    """A zero per channel that depends on the empty ``x``: a constant's message torch.compile would put elsewhere."""
    return x.sum(dim=[d for d in range(x.dim()) if d != 1], dtype=torch.float64)
