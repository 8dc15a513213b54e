"""Calls the CPU kernels in ``cpu.c``, through ctypes. They compute the same as torch's kernels, but for rounding.

``cpu.c`` is built when the package is installed. Without a C compiler, or with ``SYNCBN_NATIVE=0``, torch's kernels
replace them and take two to six times as long.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from syncbn.nn import native, tracing
from syncbn.nn.kernels import memory_format

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_CPU = torch.device("cpu")
disabled = os.environ.get("SYNCBN_NATIVE") == "0"  # see syncbn.testing.without_native


class Shape(ctypes.Structure):
    """Memory layout of a tensor: ``n * s`` positions of ``c`` channels, in rows of channels or planes of positions."""

    _fields_ = [(name, ctypes.c_int64) for name in "ncs"] + [(name, ctypes.c_int) for name in ("rows", "threads")]


def _load() -> dict[str, Callable[..., int]]:
    """The library's functions by name; empty without the library."""
    library = native.load()
    if library is None:
        return {}
    size, flag, number, array = ctypes.c_int64, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
    library.syncbn_sums.argtypes = [flag, array, Shape, number, array]
    library.syncbn_statistics.argtypes = [array, size, array]
    library.syncbn_update_running.argtypes = [array, size, *[array] * 3, number, flag, array]
    library.syncbn_normalize.argtypes = [flag, *[array] * 8, number, flag, Shape]
    library.syncbn_gradient_sums.argtypes = [flag, *[array] * 5, number, Shape, *[array] * 3]
    library.syncbn_input_gradient.argtypes = [flag, *[array] * 9, number, Shape]
    names = ("sums", "statistics", "update_running", "normalize", "gradient_sums", "input_gradient")
    return {name: getattr(library, f"syncbn_{name}") for name in names}


_functions = _load()


def built() -> bool:
    """Whether there is a library for this machine."""
    return bool(_functions)


def takes(*tensors: Tensor | None, channels: int | None = None) -> bool:
    """Whether the library is there and may access these by their address; see :mod:`.kernels.memory_format`."""
    if not _functions or disabled or not tracing.unwatched():
        return False
    return memory_format.are_plain(*tensors, device=_CPU, channels=channels)


def shape(x: Tensor) -> Shape | None:
    """The memory layout of ``x`` if it is supported: float32 or bfloat16, dense, channels or positions innermost."""
    if x.dtype not in _TYPES or not takes(x):
        return None
    n, c, s = x.shape[0], x.shape[1], memory_format.positions(x)
    if n * c * s == 0:
        return None
    if c > 1 and memory_format.channels_innermost(x):
        return Shape(n, c, s, 1, torch.get_num_threads())
    return Shape(n, c, s, 0, torch.get_num_threads()) if x.is_contiguous() else None


def sums(x: Tensor, at: Shape, need: float = 0.0) -> Tensor:
    """``[n, sum x, sum x^2, need]``: float64, shape ``(2C + 2,)``; a product of two values is exact in it."""
    out = _empty(2 * at.c + 2, torch.float64)
    _run("sums", _TYPES[x.dtype], x, at, need, out)
    return out


def statistics(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance, and what the mean lost in rounding, of the set with these sums; float32."""
    channels = len(sums) // 2
    out = _empty(3 * channels)
    _run("statistics", sums, channels, out)
    return _three(out)


def takes_running(running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, sums: Tensor) -> bool:
    """Whether :func:`update_running` supports these: contiguous float32 buffers, and one count."""
    if not takes(sums, tracked) or (tracked is not None and (tracked.numel() != 1 or tracked.dtype != torch.int64)):
        return False
    for buffer in (running_mean, running_var):
        if buffer.dtype != torch.float32 or not buffer.is_contiguous():
            return False
    return memory_format.are_plain(running_mean, running_var, device=_CPU, channels=len(sums) // 2)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    sums: Tensor,
    momentum: float,
    biased: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the running statistics towards those of the set with these sums, and counts it in ``tracked``.

    Returns:
        :func:`statistics` of the set.
    """
    channels = len(sums) // 2
    out = _empty(3 * channels)
    _run("update_running", sums, channels, running_mean, running_var, tracked, momentum, biased, out)
    # torch does not see the change. Autograd must refuse a backward pass that needs the values from before it.
    torch.autograd.graph.increment_version([t for t in (running_mean, running_var, tracked) if t is not None])
    return _three(out)


def _three(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, rest = out.view(3, -1).unbind()
    return mean, var, rest


def normalize(
    x: Tensor,
    at: Shape,
    statistics: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``(x - mean - rest) / sqrt(var + eps) * weight + bias + residual``, laid out as ``x``; then a ReLU if asked."""
    y = torch.empty_like(x)
    residual = None if residual is None else memory_format.ordered(residual, bool(at.rows))
    parameters = (*statistics, _float32(weight), _float32(bias))
    _run("normalize", _TYPES[x.dtype], x, residual, y, *parameters, eps, relu, at)
    return y


def gradient_sums(
    dy: Tensor, x: Tensor, at: Shape, statistics: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``[sum dy, sum dy*xhat]`` per channel: float64, shape ``(2C,)``; and both in float32, shape ``(C,)``."""
    out, dbias, dweight = _empty(2 * at.c, torch.float64), _empty(at.c), _empty(at.c)
    _run(
        "gradient_sums",
        _TYPES[x.dtype],
        memory_format.ordered(dy, bool(at.rows)),
        x,
        *statistics,
        eps,
        at,
        out,
        dbias,
        dweight,
    )
    return out, dbias, dweight


def input_gradient(
    dy: Tensor,
    x: Tensor,
    at: Shape,
    n: Tensor,
    statistics: Sequence[Tensor],
    weight: Tensor | None,
    sums: Tensor,
    eps: float,
) -> Tensor:
    """The gradient of ``x``, laid out as it is, from the group's ``n`` and ``sums``, both float64."""
    dx = torch.empty_like(x)
    _run(
        "input_gradient",
        _TYPES[x.dtype],
        memory_format.ordered(dy, bool(at.rows)),
        x,
        dx,
        *statistics,
        _float32(weight),
        n,
        sums,
        eps,
        at,
    )
    return dx


def _float32(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.detach().to(torch.float32).contiguous()


def _empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")  # not torch's default device, which may be another


def _run(name: str, *arguments: object) -> None:
    """Calls the function of that name, with addresses for tensors.

    Raises:
        RuntimeError: the memory of a tensor was freed.
    """
    addresses = [(a.data_ptr() or _freed(name, a)) if isinstance(a, Tensor) else a for a in arguments]
    if _functions[name](*addresses):
        raise MemoryError(f"{name}: no memory for the sums of each channel")


def _freed(name: str, t: Tensor) -> NoReturn:
    raise RuntimeError(f"{name}: the storage of a tensor of shape {tuple(t.shape)} was freed; keep it until backward")
