"""Memory layout of tensors, and which tensors a kernel may read and write by their address."""

import torch
from torch import Tensor

from syncbn.nn import torch_internals

_PLAIN = (Tensor, torch.nn.Parameter)


def are_plain(*tensors: Tensor | None, device: torch.device, channels: int | None = None) -> bool:
    """Whether a kernel may access these by their address: strided tensors of this device, without lazy state or
    subclass.

    With ``channels`` each must be of shape ``(channels,)``; torch's kernels broadcast or refuse any other.
    """
    is_zero_tensor = torch_internals.is_zero_tensor
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.device != device or t.layout is not torch.strided:
            return False
        if t.is_neg() or is_zero_tensor(t):
            return False
        if channels is not None and (t.dim() != 1 or t.numel() != channels):
            return False
    return True


def are_buffers(
    running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, *, device: torch.device, channels: int
) -> bool:
    """Whether a kernel may move these: contiguous float32 buffers of shape ``(channels,)``, and one count."""
    if tracked is not None and (tracked.numel() != 1 or tracked.dtype != torch.int64):
        return False
    for buffer in (running_mean, running_var):
        if buffer.dtype != torch.float32 or not buffer.is_contiguous():
            return False
    return are_plain(tracked, device=device) and are_plain(running_mean, running_var, device=device, channels=channels)


def positions(x: Tensor) -> int:
    """The number of positions of a channel of one sample: the product of ``x.shape[2:]``."""
    count = 1
    for size in x.shape[2:]:
        count *= size
    return count


def channels_innermost(x: Tensor) -> bool:
    """Whether the memory of ``x`` is a dense matrix with a row of channels for each position."""
    shape, stride = x.shape, x.stride()
    if stride[1] != 1:
        return False
    expected = shape[1]
    for d in (*range(x.dim() - 1, 1, -1), 0):
        if shape[d] != 1 and stride[d] != expected:
            return False
        expected *= shape[d]
    return True


def ordered(x: Tensor, rows: bool) -> Tensor:
    """``x`` with its values in rows of channels, or contiguous."""
    if not rows:
        return x.contiguous()
    return x if channels_innermost(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
