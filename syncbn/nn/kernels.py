"""The passes over the data, on one device, put together from torch's own kernels.

Every function takes ``x`` of shape ``(N, C, *)`` in any floating type and any memory layout. Sums over the data are
taken in float32 (float64 for float64 input) and handed on in float64, never in half precision. The same calls run on
the CPU and on CUDA, and on CUDA none reads a value back to the host.

Two passes do nearly all of it. ``native_batch_norm_backward`` in evaluation mode with the output mask
``[False, True, True]`` is a fused reduction that gives ``sum dy*(x - mean)`` and ``sum dy``. The other is a per-channel
affine map.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.nn.statistics import Moments, known, may_read

# Values whose mean is within so many standard deviations of zero are squared as they are, which in float32 costs the
# variance up to 5e-6 of itself. Others are centred first.
_NEAR_ZERO = 2.0
# With channels innermost the reduction adds row to row in float32: after 1.6 million rows the variance is 1e-3 off. So
# it gets few rows at a time, as wide as its accumulators fit into a core's first cache.
_ROWS, _WIDTH = 2048, 1024
# From so many values on, an affine map of channels-last data is faster by addcmul than by torch's batch norm.
_LARGE = 2**16


class Local(NamedTuple):
    """What one device knows of its values.

    Attributes:
        sums: ``[n, sum x, sum x^2]`` per channel: float64, shape ``(2C + 1,)``.
        shift: the values' mean but for its rounding, shape ``(C,)``; None where they are near zero anyway.
        shifted: ``x - shift``, a new tensor of the shape of ``x``; None where ``shift`` is.
    """

    sums: Tensor
    shift: Tensor | None = None
    shifted: Tensor | None = None


class Statistics(NamedTuple):
    """What the passes over the data normalize with, in the type that they compute in.

    Attributes:
        mean, var: shape ``(C,)``.
        rest: what ``mean`` lost in rounding, shape ``(C,)``; None where the values are near zero and it says nothing.
    """

    mean: Tensor
    var: Tensor
    rest: Tensor | None


def local_sums(x: Tensor, mask: Tensor | None = None) -> Local:
    """The sums of this device's values, to the digits of their type whatever their offset and count.

    Values far from zero are centred on their float32 mean before they are squared, and what that mean lost in rounding
    is carried along. On the CPU, where looking costs nothing, the plain sums tell whether that is necessary; elsewhere,
    and under torch.compile, all are centred. An empty ``x`` gives zeros.

    Args:
        x: shape ``(N, C, *)``.
        mask: bool, broadcasts to ``x``; only where it is True does a value count.
    """
    channels = x.shape[1]
    if x.numel() == 0:  # a shape, not a value: no wait; and torch's reduction kernel divides by zero on an empty tensor
        return Local(_nothing(x).repeat(3)[channels - 1 :])
    values = blank(x, mask).to(statistics_dtype(x))
    if mask is None:
        n = torch.full((1,), x.numel() // channels, dtype=torch.float64, device=x.device)
    else:
        n = mask.expand_as(x[:, :1]).sum().double().reshape(1)
    if may_read(x):
        sums = torch.cat([n, _sums(values, values)])
        _, total, squares = sums.split([1, channels, channels])
        excess = torch.addcmul(squares, total, total, value=(-1 - _NEAR_ZERO**-2) / max(n.item(), 1))
        if excess.min().item() >= 0:
            return Local(sums)
    else:
        total = values.sum(dim=[d for d in range(x.dim()) if d != 1])
    shift = (total / n.clamp_min(1)).to(values.dtype)
    shifted = values - _per_channel(shift, x)
    if mask is not None:
        shifted.masked_fill_(~mask, 0)
    remainder, squares = _sums(shifted, shifted).split(channels)
    mean = shift.double()
    total = n * mean + remainder
    return Local(torch.cat([n, total, squares + mean * (remainder + total)]), shift, shifted)


def rounded(moments: Moments, x: Tensor, local: Local) -> Statistics:
    """``moments`` in the type that the passes over ``x`` compute in."""
    dtype = statistics_dtype(x)
    mean = moments.mean.to(dtype)
    rest = None if local.shift is None else (moments.mean - mean).to(dtype)
    return Statistics(mean, moments.var.to(dtype), rest)


def normalize(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    local: Local | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` in the type and layout of ``x``; uses up ``local.shifted``."""
    mean, var, rest = statistics
    multiply = may_read(x) and x.numel() >= _LARGE and x.dtype == mean.dtype and _channels_innermost(x)
    if rest is None and not multiply:
        return F.batch_norm(x, mean, var, _cast(weight, mean.dtype), _cast(bias, mean.dtype), eps=eps)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(mean.dtype)
    if rest is None:
        offset = (mean * scale).neg_() if bias is None else torch.addcmul(bias.to(mean.dtype), mean, scale, value=-1)
        return _laid_out(torch.addcmul(_per_channel(offset, x), x, _per_channel(scale, x)), x)
    if local is None or local.shift is None or local.shifted is None:
        shifted, by = x - _per_channel(mean, x), rest
    else:
        shifted, by = local.shifted, mean - local.shift + rest
    shifted.sub_(_per_channel(by, x)).mul_(_per_channel(scale, x))
    if bias is not None:
        shifted.add_(_per_channel(bias, x))
    return _laid_out(shifted.to(x.dtype), x)


def gradient_sums(dy: Tensor, x: Tensor, statistics: Statistics, eps: float) -> Tensor:
    """``[sum dy, sum dy*xhat]`` of this device's values, per channel: float64, shape ``(2C,)``.

    Args:
        dy, x: of one type, float32 or float64.
    """
    if x.numel() == 0:
        return _nothing(dy).repeat(2)
    mean, var, rest = statistics
    sums = _sums(dy, x, mean, var, eps)
    if rest is not None:
        total, weighted = sums.split(len(mean))
        weighted.addcmul_(rest * (var + eps).rsqrt(), total, value=-1)
    return sums


def input_gradient(
    dy: Tensor, x: Tensor, n: Tensor, statistics: Statistics, weight: Tensor | None, sums: Tensor, eps: float
) -> Tensor:
    """The gradient of ``x``, in its layout, from ``gradient_sums`` added up over the group.

    ``dx = weight * invstd * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n)`` (Ioffe & Szegedy 2015, section 3, with the
    sums taken over every device that shared the statistics).

    Args:
        dy, x: of one type, float32 or float64.
    """
    scale = (statistics.var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset, slope = (sums.view(2, -1) * (scale / -known(n))).to(x.dtype).unbind()
    # xhat * slope + offset, then dy on top in place: two passes, one new tensor.
    return normalize(x, statistics, slope, offset, eps).addcmul_(dy, _per_channel(scale, x))


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros where ``mask`` is False, in its layout."""
    return x if mask is None else x.clone().masked_fill_(~mask, 0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type in which values of ``x`` are summed: never half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums(dy: Tensor, x: Tensor, mean: Tensor | None = None, var: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """``[sum dy, sum dy*(x - mean)/sqrt(var + eps)]`` per channel: float64, shape ``(2C,)``; mean 0 and variance 1."""
    channels = x.shape[1]
    positions = x.numel() // channels
    beside = 1
    parts: list[tuple[Tensor, ...]] = [(dy, x)]
    if positions > _ROWS and may_read(x) and _channels_innermost(x):
        if not _channels_innermost(dy):
            dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
        # The same memory, channels last, with the channels of so many positions side by side and as many fewer rows.
        beside = math.gcd(positions, 1 << max(_WIDTH // channels, 1).bit_length() - 1)
        width, rows = beside * channels, positions // beside
        parts = [tuple(t.as_strided((1, width, rows, 1), (1, 1, width, width)) for t in (dy, x))]
        if rows > _ROWS:
            parts = list(zip(*(t.split(_ROWS, 2) for t in parts[0]), strict=True))
    if mean is None or var is None:
        width = beside * channels
        mean, var = x.new_zeros(width), x.new_ones(width)
    elif beside > 1:
        mean, var = mean.repeat(beside), var.repeat(beside)
    sums = torch.cat([part for pair in parts for part in _reduce(pair[0], pair[1], mean, var, eps)])
    if len(parts) == beside == 1:
        return sums.double()
    return sums.view(-1, 2, beside, channels).sum((0, 2), dtype=torch.float64).view(-1)


def _reduce(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(sum dy, sum dy*(x - mean)/sqrt(var + eps))`` per channel, in the type of ``mean``."""
    mask = [False, True, True]
    _, weighted, total = torch.ops.aten.native_batch_norm_backward(dy, x, None, mean, var, None, None, False, eps, mask)
    return total, weighted


def _channels_innermost(x: Tensor) -> bool:
    """Whether the memory of ``x`` is a dense matrix with a row of channels for each position."""
    channels, stride = x.shape[1], x.stride()
    if stride[1] != 1:
        return False
    expected = channels
    for d in range(x.dim() - 1, -1, -1):
        if d != 1:
            if x.shape[d] != 1 and stride[d] != expected:
                return False
            expected *= x.shape[d]
    return True


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


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)
