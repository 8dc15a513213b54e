"""Calls the CPU kernels in ``cpu.c``, through ctypes. They compute the same as torch's kernels, but for rounding.

``cpu.c`` is built when the package is installed. Without a C compiler, or with ``SYNCBN_NATIVE=0``, torch's kernels
replace them and take two to six times as long.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from syncbn.nn import native, tracing
from syncbn.nn.kernels import memory_format

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_CPU = torch.device("cpu")
disabled = os.environ.get("SYNCBN_NATIVE") == "0"  # see syncbn.testing.without_native


class Shape(NamedTuple):
    """Memory layout of a tensor: ``n * s`` positions of ``c`` channels, in rows of channels or planes of positions."""

    n: int
    c: int
    s: int
    rows: bool
    threads: int


_NAMES = ("sums", "statistics", "update_running", "normalize", "finish", "gradient_sums", "input_gradient")
_PASS = struct.Struct("@qqqiiiidd10P")  # the fields of Pass in cpu.c


def _load() -> dict[str, Callable[[bytes], int]]:
    """The library's functions by name; empty without the library."""
    library = native.load()
    if library is None:
        return {}
    for name in _NAMES:
        getattr(library, f"syncbn_{name}").argtypes = [ctypes.c_char_p]
    return {name: getattr(library, f"syncbn_{name}") for name in _NAMES}


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
    n, c, values, contiguous = x.shape[0], x.shape[1], x.numel(), x.is_contiguous()
    if values == 0:
        return None
    s = values // (n * c)
    rows = c > 1 and (s == 1 if contiguous else memory_format.channels_innermost(x))
    return Shape(n, c, s, rows, torch.get_num_threads()) if rows or contiguous else None


def sums(x: Tensor, at: Shape, need: float = 0.0) -> Tensor:
    """``[n, sum x, sum x^2, need]``: float64, shape ``(2C + 2,)``; a product of two values is exact in it."""
    out = _empty(2 * at.c + 2, torch.float64)
    _run("sums", at, type=_TYPES[x.dtype], number=need, x=_at(x), sums=out.data_ptr())
    return out


def number(payload: Tensor, index: int) -> float:
    """A number of a float64 tensor of the CPU that :func:`takes` accepts, in less time than ``item()``."""
    return ctypes.c_double.from_address(payload.data_ptr() + 8 * index).value


def statistics(sums: Tensor) -> Tensor:
    """Mean, biased variance, and what the mean lost in rounding, of the set with these sums; float32, ``(3, C)``."""
    channels = len(sums) // 2
    out = torch.empty((3, channels), dtype=torch.float32, device="cpu")
    _run("statistics", Shape(0, channels, 0, False, 1), sums=sums.data_ptr(), statistics=out.data_ptr())
    return out


def takes_running(running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, sums: Tensor) -> bool:
    """Whether :func:`update_running` supports these."""
    return takes(sums) and memory_format.are_buffers(
        running_mean, running_var, tracked, device=_CPU, channels=len(sums) // 2
    )


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    sums: Tensor,
    momentum: float,
    biased: bool = False,
) -> Tensor:
    """Moves the running statistics towards those of the set with these sums, and counts it in ``tracked``.

    Returns:
        :func:`statistics` of the set.
    """
    channels = len(sums) // 2
    out = torch.empty((3, channels), dtype=torch.float32, device="cpu")
    _run(
        "update_running",
        Shape(0, channels, 0, False, 1),
        flag=biased,
        number=momentum,
        sums=sums.data_ptr(),
        statistics=out.data_ptr(),
        first=_at(running_mean),
        second=_at(running_var),
        tracked=_at(tracked),
    )
    _note_change(running_mean, running_var, tracked)
    return out


def _note_change(running_mean: Tensor, running_var: Tensor, tracked: Tensor | None) -> None:
    """Tells autograd, which must refuse a backward pass that needs the values from before: torch sees no change."""
    moved = (running_mean, running_var) if tracked is None else (running_mean, running_var, tracked)
    torch.autograd.graph.increment_version(moved)


def finish(
    x: Tensor,
    at: Shape,
    sums: Tensor,
    running: tuple[Tensor, Tensor, Tensor | None] | None,
    momentum: float,
    biased: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """All that comes after the all-reduce, in one call: :func:`update_running` or :func:`statistics`, and normalize.

    Args:
        running: mean, variance and count to move, which :func:`.memory_format.are_buffers` accepts; or None.

    Returns:
        The output and the statistics.
    """
    mean, var, tracked = running or (None, None, None)
    weight, bias = _float32(weight), _float32(bias)
    out = torch.empty((3, at.c), dtype=torch.float32, device="cpu")
    y = torch.empty_like(x)
    _run(
        "finish",
        at,
        type=_TYPES[x.dtype],
        flag=biased,
        eps=eps,
        number=momentum,
        x=_at(x),
        out=y.data_ptr(),
        sums=sums.data_ptr(),
        statistics=out.data_ptr(),
        weight=_at(weight),
        bias=_at(bias),
        first=_at(mean),
        second=_at(var),
        tracked=_at(tracked),
    )
    if mean is not None and var is not None:
        _note_change(mean, var, tracked)
    return y, out


def normalize(
    x: Tensor,
    at: Shape,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``(x - mean - rest) / sqrt(var + eps) * weight + bias + residual``, laid out as ``x``; then a ReLU if asked."""
    y = torch.empty_like(x)
    weight, bias = _float32(weight), _float32(bias)
    residual = None if residual is None else memory_format.ordered(residual, at.rows)
    _run(
        "normalize",
        at,
        type=_TYPES[x.dtype],
        flag=relu,
        eps=eps,
        x=_at(x),
        dy=_at(residual),
        out=y.data_ptr(),
        statistics=_at(statistics),
        weight=_at(weight),
        bias=_at(bias),
    )
    return y


def gradient_sums(dy: Tensor, x: Tensor, at: Shape, statistics: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``[sum dy, sum dy*xhat]`` per channel: float64, shape ``(2C,)``; and both in float32, shape ``(C,)``."""
    dy = memory_format.ordered(dy, at.rows)
    out, dbias, dweight = _empty(2 * at.c, torch.float64), _empty(at.c), _empty(at.c)
    _run(
        "gradient_sums",
        at,
        type=_TYPES[x.dtype],
        eps=eps,
        x=_at(x),
        dy=_at(dy),
        sums=out.data_ptr(),
        statistics=_at(statistics),
        first=dbias.data_ptr(),
        second=dweight.data_ptr(),
    )
    return out, dbias, dweight


def input_gradient(
    dy: Tensor,
    x: Tensor,
    at: Shape,
    n: float,
    statistics: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    eps: float,
) -> Tensor:
    """The gradient of ``x``, laid out as it is, from the group's ``n`` and ``sums``, which are float64."""
    dy, weight = memory_format.ordered(dy, at.rows), _float32(weight)
    dx = torch.empty_like(x)
    _run(
        "input_gradient",
        at,
        type=_TYPES[x.dtype],
        eps=eps,
        number=n,
        x=_at(x),
        dy=_at(dy),
        out=dx.data_ptr(),
        sums=sums.data_ptr(),
        statistics=_at(statistics),
        weight=_at(weight),
    )
    return dx


def _float32(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.detach().to(torch.float32).contiguous()


def _empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")  # not torch's default device, which may be another


# Callers hold every tensor whose address they pass until the call has returned.
def _run(
    name: str,
    at: Shape,
    *,
    type: int = 0,
    flag: int = 0,
    eps: float = 0.0,
    number: float = 0.0,
    x: int = 0,
    dy: int = 0,
    out: int = 0,
    sums: int = 0,
    statistics: int = 0,
    weight: int = 0,
    bias: int = 0,
    first: int = 0,
    second: int = 0,
    tracked: int = 0,
) -> None:
    """Calls the function of that name, with the fields of Pass in cpu.c; addresses for tensors, 0 for none."""
    fields = (type, flag, eps, number, x, dy, out, sums, statistics, weight, bias, first, second, tracked)
    if _functions[name](_PASS.pack(*at, *fields)):
        raise MemoryError(f"{name}: no memory for the sums of each channel")


def _at(t: Tensor | None) -> int:
    """The address of a tensor's memory, 0 for None.

    Raises:
        RuntimeError: the memory was freed.
    """
    return 0 if t is None else (t.data_ptr() or _freed(t))


def _freed(t: Tensor) -> NoReturn:
    raise RuntimeError(f"the storage of a tensor of shape {tuple(t.shape)} was freed; keep it until backward")
