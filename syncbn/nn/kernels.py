"""The passes over the data, on one device, put together from torch's own kernels.

Every function takes ``x`` of shape ``(N, C, *)`` in any floating type and any memory layout. Statistics are computed
and returned in float32 at least (float64 for float64 input) and in float64 where they are sums. The same calls run
on the CPU and on CUDA, and none reads a value back to the host.

Two of torch's kernels in evaluation mode do nearly all of it. ``batch_norm`` is a fused per-channel affine map.
``native_batch_norm_backward`` with the output mask ``[False, True, True]`` is a fused reduction that gives
``sum dy*(x - mean)*invstd`` and ``sum dy``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.nn.statistics import Moments


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type in which per-channel numbers of ``x`` are handled: never half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def local_sums(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[n, sum x, sum x^2]`` of this device's values, per channel: float64, shape ``(2C + 1,)``.

    The values are centred on their float32 mean before they are squared, and what that mean lost in rounding is
    carried along, so that neither a large offset nor a large count costs digits. An empty ``x`` gives zeros.

    Args:
        x: shape ``(N, C, *)``.
        mask: bool, broadcasts to ``x``; only where it is True does a value count.
    """
    channels = x.shape[1]
    if x.numel() == 0:  # a shape, not a value: no wait; and torch's reduction kernel divides by zero on an empty tensor
        return _nothing(x).repeat(3)[channels - 1 :]
    x = x.to(statistics_dtype(x))
    dims = [d for d in range(x.dim()) if d != 1]
    if mask is None:
        mean = x.mean(dim=dims)
        n = torch.full_like(mean[:1], x.numel() // channels, dtype=torch.float64)
    else:
        n = mask.expand_as(x[:, :1]).sum().double().reshape(1)
        mean = x.masked_fill(~mask, 0).sum(dim=dims) / n.clamp_min(1).to(x.dtype)
        x = torch.where(mask, x, _per_channel(mean, x))  # what is left out sits on the mean and adds nothing below
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    centred = F.batch_norm(x, mean, ones, eps=0.0)
    squares, remainder = _reduce(centred, centred, zeros, ones, eps=0.0)
    mean, squares, remainder = mean.double(), squares.double(), remainder.double()
    total = n * mean + remainder
    total_of_squares = squares + mean * (2 * remainder + n * mean)
    return torch.cat([n, total, total_of_squares])


def normalize(x: Tensor, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` in the type and layout of ``x``."""
    dtype = statistics_dtype(x)
    mean, var = moments.mean.to(dtype), moments.var.to(dtype)
    return F.batch_norm(x, mean, var, _cast(weight, dtype), _cast(bias, dtype), eps=eps)


def gradient_sums(dy: Tensor, x: Tensor, moments: Moments, eps: float) -> Tensor:
    """``[sum dy, sum dy*xhat]`` of this device's values, per channel: float64, shape ``(2C,)``."""
    if x.numel() == 0:
        return _nothing(dy).repeat(2)
    dtype = statistics_dtype(x)
    weighted, plain = _reduce(dy.to(x.dtype), x, moments.mean.to(dtype), moments.var.to(dtype), eps)
    return torch.cat([plain, weighted]).double()


def input_gradient(dy: Tensor, x: Tensor, moments: Moments, weight: Tensor | None, sums: Tensor, eps: float) -> Tensor:
    """The gradient of ``x``, in its type and layout, from ``gradient_sums`` added up over the group.

    ``dx = weight * invstd * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n)`` (Ioffe & Szegedy 2015, section 3, with the
    sums taken over every device that shared the statistics).
    """
    dtype = statistics_dtype(x)
    channels = x.shape[1]
    scale = (moments.var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    mean_dy, mean_dy_xhat = (sums / moments.n.clamp_min(1)).split(channels)
    # xhat * a + b by the evaluation kernel, then dy on top in place: two passes, one new tensor.
    dx = normalize(x.to(dtype), moments, -scale * mean_dy_xhat, -scale * mean_dy, eps)
    return dx.addcmul_(dy.to(dtype), _per_channel(scale.to(dtype), x)).to(x.dtype)


def _reduce(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(sum dy*(x - mean)/sqrt(var + eps), sum dy)`` per channel, in the type of ``mean``."""
    mask = [False, True, True]
    _, weighted, plain = torch.ops.aten.native_batch_norm_backward(dy, x, None, mean, var, None, None, False, eps, mask)
    return weighted, plain


def _nothing(x: Tensor) -> Tensor:
    """A zero per channel that depends on the empty ``x``: a constant's message torch.compile would put elsewhere."""
    return x.sum(dim=[d for d in range(x.dim()) if d != 1], dtype=torch.float64)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` of shape ``(C,)`` so that they broadcast to ``x``."""
    return values.view([1, -1] + [1] * (x.dim() - 2))


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)
