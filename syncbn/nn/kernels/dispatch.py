"""The passes over the data on one device: sums, normalization, gradients. Chooses the kernels for each.

Every function takes ``x`` of shape ``(N, C, *)`` in any floating type and any memory layout. Sums over the data are
returned in float64, and never computed in half precision.

The kernels are those of :mod:`syncbn.nn.kernels.cpu` or :mod:`syncbn.nn.kernels.gpu` if they support the tensors, else
torch's. The calls of torch are the same on the CPU and on CUDA, and on CUDA none reads a value back to the host.
``native_batch_norm_backward`` in evaluation mode with the output mask ``[False, True, True]`` is a fused reduction that
returns ``sum dy*(x - mean)`` and ``sum dy`` (torch 2.13).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.nn.kernels import cpu, gpu, memory_format, triton_tiling
from syncbn.nn.statistics import may_read, number_or_tensor, unpack

# What the passes over the data normalize with, one tensor of shape (3, C) in the type that they compute in: the mean,
# rounded; the variance; and the exact mean minus the rounded one.
Statistics = Tensor


class Local(NamedTuple):
    """The sums of this device's values, and intermediate results that the normalization reuses.

    Attributes:
        payload: the tensor for the all-reduce: the sums, followed by ``need`` if :func:`carries_need`.
        at: memory layout of ``x`` for a compiled kernel; None for torch's kernels.
        shift: the values' mean, rounded, shape ``(C,)``; None if they were not centred.
        shifted: ``x - shift``, a new tensor of the shape of ``x``; None if ``shift`` is.
    """

    payload: Tensor
    at: cpu.Shape | triton_tiling.Shape | None = None
    shift: Tensor | None = None
    shifted: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """``[n, sum x, sum x^2]`` per channel: float64, shape ``(2C + 1,)``; a view of the payload."""
        return sums_of(self.payload)


class Relu(NamedTuple):
    """The backward passes' data about a ReLU after the batch norm.

    Attributes:
        bias: of the batch norm before it, or None.
        passed: which values it passed: its output, shape ``(N, C, *)``; or the bits of :mod:`syncbn.nn.kernels.gpu`; or
            None if the input alone decides.
        rows: the memory layout of the input for these bits (see :class:`.triton_tiling.Shape`). Hooks on saved tensors
            may return the input in another layout.
    """

    bias: Tensor | None
    passed: Tensor | None
    rows: bool

    @property
    def gate(self) -> tuple[Tensor | None, Tensor | None]:
        """Bias and bits, the form of :mod:`syncbn.nn.kernels.gpu`."""
        return self.bias, self.passed


class Pair(NamedTuple):
    """An input and the gradient of its output, as the backward passes take them: of one type, zero where masked.

    Attributes:
        x, dy: shape ``(N, C, *)``; float32 or float64, for compiled kernels also float16 or bfloat16.
        at: memory layout of ``x`` if a compiled kernel takes both; None for torch's kernels.
        relu: a ReLU through which ``dy`` is still to be propagated, by the kernels of :mod:`syncbn.nn.kernels.gpu`.
    """

    x: Tensor
    dy: Tensor
    at: cpu.Shape | triton_tiling.Shape | None
    relu: Relu | None = None


def carries_need(x: Tensor) -> bool:
    """Whether the all-reduce for ``x`` has one number more, ``need``: on the CPU, where reading it is free."""
    return x.is_cpu and not gpu.serves(x)


def number(payload: Tensor, index: int, local: Local) -> Tensor | float:
    """One of the float64 numbers of a payload; a tensor where the host would have to wait for it."""
    if isinstance(local.at, cpu.Shape):
        return cpu.number(payload, index)
    if gpu.serves(payload):  # its kernels take a tensor
        return payload[index]
    return number_or_tensor(payload[index])


def sums_of(payload: Tensor) -> Tensor:
    """The sums in a payload, with or without a number after them: their count ``2C + 1`` is odd."""
    return payload[: len(payload) - 1 | 1]


def local_sums(x: Tensor, mask: Tensor | None = None, need: float = 0.0) -> Local:
    """The sums of this device's values, accurate to the digits of their type for any offset and count.

    With torch's kernels values are centred on their rounded mean before they are squared, and the sums are corrected
    for the rounding. For an empty ``x`` they are zeros.

    Args:
        x: shape ``(N, C, *)``.
        mask: bool, broadcasts to ``x``; only where it is True does a value count.
        need: the number after the sums; see :func:`carries_need`.
    """
    channels = x.shape[1]
    if x.numel() == 0:  # torch's reduction kernel divides by zero on an empty tensor
        zeros = _nothing(x).repeat(3)[channels - 1 :]
        return Local(torch.cat([zeros, zeros[:1] + need]) if carries_need(x) else zeros)
    values, at = blank(x, mask), _shape(x)
    if mask is not None and isinstance(at, triton_tiling.Shape):
        at = None  # the Triton kernel sums float32 distances from a shift, which blanks would spoil
    n = None if mask is None else mask.expand_as(x[:, :1]).sum().double().reshape(1)
    if at is not None:
        payload = gpu.sums(values, at) if isinstance(at, triton_tiling.Shape) else cpu.sums(values, at, need)
        if n is not None:
            payload[:1] = n
        return Local(payload, at)
    # A Python number if it is known, and a tensor in the payload only. Inductor merges equal constants: as a tensor,
    # all layers of one size would share it, in the payload of the first, and read the ranks' sum there (torch 2.13).
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
        return gpu.statistics(sums)
    if dtype == torch.float32 and cpu.takes(sums):
        return cpu.statistics(sums)
    moments = unpack(sums)
    mean = moments.mean.to(dtype)
    return torch.stack([mean, moments.var.to(dtype), (moments.mean - mean).to(dtype)])


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
        The output, in the type and layout of ``x``, and ``passed`` of :class:`Relu`. Overwrites ``local.shifted``.
    """
    at = None if local is None else local.at
    if at is not None and _as_memory(x, weight, bias) and memory_format.are_plain(residual, device=x.device):
        if isinstance(at, triton_tiling.Shape):
            y, bits = gpu.normalize(x, at, statistics, weight, bias, eps, residual, relu)
            return laid_out(y, x), bits
        y = laid_out(cpu.normalize(x, at, statistics, weight, bias, eps, residual, relu), x)
        return y, y if relu else None
    values = _affine(x, statistics, weight, bias, eps, local)
    if residual is not None:
        values.add_(residual)
    y = laid_out((values.relu_() if relu else values).to(x.dtype), x)
    return y, y if relu else None


def relu_gradient(
    dy: Tensor, x: Tensor, statistics: Statistics, weight: Tensor | None, eps: float, relu: Relu | None
) -> Tensor:
    """The gradient of the ReLU's input from that of its output; differentiable in ``dy``."""
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
    n: Tensor | float = 0.0,
) -> Pair:
    """Both as the backward passes take them. Also checks all other operands of :func:`input_gradient`."""
    bias, passed = (None, None) if relu is None else relu.gate
    bits = passed is not None and passed.dtype == torch.uint8
    if relu is not None and passed is not None and bits:
        relu = relu._replace(passed=passed.contiguous())
        x = memory_format.ordered(x, relu.rows)
    at = None if x.numel() == 0 or dy.dtype != x.dtype else _shape(x)
    tensors = (dy, statistics, passed, n if isinstance(n, Tensor) else None)
    if at is not None and not (memory_format.are_plain(*tensors, device=x.device) and _as_memory(x, weight, bias)):
        at = None
    # After torch's forward kernels, or those of the CPU, only the output tells which values the ReLU passed.
    if not (isinstance(at, triton_tiling.Shape) and relu is not None and (bits or relu.passed is None)):
        dy, relu = relu_gradient(dy, x, statistics, weight, eps, relu), None
    x, dy = blank(x, mask), blank(dy, mask)
    if at is None:
        x, dy = (t.to(statistics_dtype(x)) for t in (x, dy))
    return Pair(x, dy, at, relu)


def gradient_sums(
    data: Pair, statistics: Statistics, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``[sum dy, sum dy*xhat]`` of this device, per channel: float64, shape ``(2C,)``; and each of the two sums."""
    x, dy, at, relu = data
    if isinstance(at, triton_tiling.Shape):
        return gpu.gradient_sums(dy, x, at, statistics, weight, eps, None if relu is None else relu.gate)
    if at is not None:
        return cpu.gradient_sums(dy, x, at, statistics, eps)
    if x.numel() == 0:
        sums = _nothing(dy).repeat(2)
    else:
        mean, var, rest = statistics.unbind()
        sums = _sums(dy, x, mean, var, eps)
        total, weighted = sums.split(len(mean))
        weighted.addcmul_(rest * (var + eps).rsqrt(), total, value=-1)
    total, weighted = sums.clone().split(x.shape[1])
    return sums, total, weighted


def input_gradient(
    data: Pair,
    n: Tensor | float,
    statistics: Statistics,
    weight: Tensor | None,
    sums: Tensor,
    eps: float,
    of_residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, in its layout, from the group's ``gradient_sums``; and of a residual, if asked for.

    ``dx = weight * invstd * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n)`` (Ioffe & Szegedy 2015, section 3, with the
    sums taken over every device that shared the statistics).
    """
    x, dy, at, relu = data
    if isinstance(at, triton_tiling.Shape):
        assert isinstance(n, Tensor)
        gate = None if relu is None else relu.gate
        dx, dresidual = gpu.input_gradient(dy, x, at, n, statistics, weight, sums, eps, gate, of_residual)
        return laid_out(dx, x), dy if dresidual is None else laid_out(dresidual, x)
    if at is not None:
        return laid_out(cpu.input_gradient(dy, x, at, float(n), statistics, weight, sums, eps), x), dy
    scale = (statistics[1] + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset, slope = (sums.view(2, -1) * (scale / -n)).to(x.dtype).unbind()
    # xhat * slope + offset, then dy on top in place: two passes, one new tensor.
    xhat = _affine(x, statistics, slope, offset, eps)
    return laid_out(xhat.addcmul_(dy, _per_channel(scale, x)), x), dy


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros where ``mask`` is False, in its layout."""
    return x if mask is None else x.clone().masked_fill_(~mask, 0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type in which values of ``x`` are summed: never half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shape(x: Tensor) -> cpu.Shape | triton_tiling.Shape | None:
    """Memory layout of ``x`` for the compiled kernels of its device; None if they do not support it."""
    return gpu.shape(x) if gpu.serves(x) else cpu.shape(x)


def _as_memory(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the compiled kernels for ``x`` support these per-channel tensors too."""
    return memory_format.are_plain(*parameters, device=x.device, channels=x.shape[1])


def _affine(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    local: Local | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, in float32 or float64; overwrites ``local.shifted``."""
    mean, var, rest = statistics.unbind()
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
    # For channels_last torch's CPU kernel adds row to row in float32: after 1.6 million rows the error is 1e-3.
    if may_read(x) and not x.is_contiguous():
        dy, x = dy.contiguous(), x.contiguous()
    if mean is None or var is None:
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    mask = [False, True, True]
    _, weighted, total = torch.ops.aten.native_batch_norm_backward(dy, x, None, mean, var, None, None, False, eps, mask)
    return torch.cat([total, weighted]).double()


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the layout of torch's batch norm output for ``x``: channels_last stays, all else is contiguous."""
    if x.is_contiguous() and y.is_contiguous():
        return y
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return y.contiguous(memory_format=layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` of shape ``(C,)`` so that they broadcast to ``x``."""
    return values.view([1, -1] + [1] * (x.dim() - 2))


def _nothing(x: Tensor) -> Tensor:
    """A zero per channel that depends on the empty ``x``: torch.compile could move an all-reduce of constants."""
    return x.sum(dim=[d for d in range(x.dim()) if d != 1], dtype=torch.float64)
