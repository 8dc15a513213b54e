"""Starts the Triton kernels on a GPU. They compute the same as torch's kernels, but for rounding.

Triton comes with torch's builds for GPUs. If it is missing, or the GPU is too old for it, torch's kernels replace them,
with more passes over the data and more launches. Nothing here waits for the device.
"""

import importlib.util
import os
import struct
import warnings
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from syncbn.nn import tracing
from syncbn.nn.kernels import memory_format, triton_tiling

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WARPS = 8  # of a program
# Tiles that a program loads ahead while it computes on one. A memory of 4 TB/s with a latency of 800 ns needs 25 KB in
# flight for each of 132 processors, and a processor has room for two programs with 100 registers a thread.
_STAGES = 3
disabled = False  # see syncbn.testing.without_gpu
interpreted = False  # see syncbn.testing.interpreted: tensors of the CPU, through Triton's interpreter


def takes(*tensors: Tensor | None, channels: int | None = None) -> bool:
    """Whether kernels can be started and may access these by their address; see :mod:`.kernels.memory_format`."""
    if disabled or not serves(tensors[0]):
        return False
    device = tensors[0].device  # type: ignore[union-attr]
    return (
        tracing.unwatched()
        and memory_format.are_plain(*tensors, device=device, channels=channels)
        and _usable(interpreted)
    )


def serves(x: Tensor | None) -> bool:
    """Whether ``x`` is on a device that the kernels are for. Checked first: on the CPU it saves all other checks."""
    return x is not None and (x.is_cuda or interpreted)


def shape(x: Tensor) -> triton_tiling.Shape | None:
    """The memory layout of ``x`` if it is supported: 32 or 16 bits, dense, channels or positions innermost."""
    if x.dtype not in _TYPES or x.numel() == 0 or not takes(x):
        return None
    n, c, s = x.shape[0], x.shape[1], memory_format.positions(x)
    if c > 1 and memory_format.channels_innermost(x):
        return triton_tiling.Shape(True, n * s, c, 1, x.element_size(), *_device(x.device.index))
    return (
        triton_tiling.Shape(False, n, c, s, x.element_size(), *_device(x.device.index)) if x.is_contiguous() else None
    )


def sums(x: Tensor, at: triton_tiling.Shape) -> Tensor:
    """``[n, sum x, sum x^2]`` per channel: float64, shape ``(2C + 1,)``."""
    tiles = triton_tiling.reduction(at)
    out = _empty(x, 2 * at.channels + 1)
    partial = out[1:] if tiles.parts == 1 else _empty(x, tiles.parts * 2 * at.channels)
    number = out if tiles.parts == 1 else None
    kind = (tiles.kind, at.values < 2**31)
    _launch("sums", (tiles.columns, tiles.splits, 1), (x, partial, number), (at.values, *tiles.numbers), kind, _WARPS)
    if tiles.parts > 1:
        _merge(partial, tiles, out[1:], out, None, at.values)
    return out


def statistics(sums: Tensor) -> Tensor:
    """Mean, biased variance, and what the mean lost in rounding, of the set with these sums; float32, ``(3, C)``."""
    channels = len(sums) // 2
    out = sums.new_empty((3, channels), dtype=torch.float32)
    _launch("statistics", _blocks(channels), (sums, out), (channels, _BLOCK), triton_tiling.kind(channels))
    return out


def takes_running(running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, sums: Tensor) -> bool:
    """Whether :func:`update_running` supports these."""
    return takes(sums) and memory_format.are_buffers(
        running_mean, running_var, tracked, device=sums.device, channels=len(sums) // 2
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
    out = sums.new_empty((3, channels), dtype=torch.float32)
    tensors = (sums, out, running_mean, running_var, tracked)
    numbers = (*_as_two_float32(momentum), channels, biased, _BLOCK)
    _launch("update_running", _blocks(channels), tensors, numbers, (*triton_tiling.kind(channels), biased))
    # torch does not see the change. Autograd must refuse a backward pass that needs the values from before it.
    torch.autograd.graph.increment_version([t for t in (running_mean, running_var, tracked) if t is not None])
    return out


def normalize(
    x: Tensor,
    at: triton_tiling.Shape,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(x - mean - rest) / sqrt(var + eps) * weight + bias + residual``, laid out as ``x``; through a ReLU if asked.

    Returns:
        The output; and with a ReLU after a residual, one bit a value: whether the ReLU passed it. Without a residual
        the backward pass computes that from ``x``.
    """
    y = torch.empty_like(x)
    bits = None
    if relu and residual is not None:
        bits = torch.empty(at.outer * at.bits_stride, dtype=torch.uint8, device=x.device)
    residual = None if residual is None else memory_format.ordered(residual, at.rows)
    _launch_pass(
        "normalize",
        triton_tiling.elementwise(at),
        (x, residual, y, bits, *statistics.unbind(), *_parameters(weight, bias)),
        eps,
        relu,
    )
    return y, bits


def gradient_sums(
    dy: Tensor,
    x: Tensor,
    at: triton_tiling.Shape,
    statistics: Tensor,
    weight: Tensor | None,
    eps: float,
    relu: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``[sum dy, sum dy*xhat]`` per channel: float64, shape ``(2C,)``; and both in float32, shape ``(C,)``.

    ``relu`` is the bias, and the bits of :func:`normalize`, of a ReLU through which ``dy`` is propagated first.
    """
    tiles = triton_tiling.reduction(at)
    out = _empty(x, 2 * at.channels)
    rounded = torch.empty(2 * at.channels, dtype=torch.float32, device=x.device)
    bias, bits = relu or (None, None)
    tensors = (memory_format.ordered(dy, at.rows), x, bits, *statistics.unbind(), *_parameters(weight, bias))
    if tiles.parts == 1:
        _launch_pass("gradient_sums", tiles, (*tensors, out, rounded), eps, relu is not None)
    else:
        partial = _empty(x, tiles.parts * 2 * at.channels)
        _launch_pass("gradient_sums", tiles, (*tensors, partial, None), eps, relu is not None)
        _merge(partial, tiles, out, None, rounded, 0)
    total, weighted = rounded.split(at.channels)
    return out, total, weighted


def input_gradient(
    dy: Tensor,
    x: Tensor,
    at: triton_tiling.Shape,
    n: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    eps: float,
    relu: tuple[Tensor | None, Tensor | None] | None = None,
    of_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of ``x``; and, if asked for, of a residual before a ReLU; laid out as ``x`` is.

    ``n`` and ``sums`` are the group's, both float64; ``relu`` as for :func:`gradient_sums`.
    """
    bias, bits = relu or (None, None)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if of_residual and bits is not None else None
    tensors = (
        memory_format.ordered(dy, at.rows),
        x,
        bits,
        dx,
        dresidual,
        *statistics.unbind(),
        *_parameters(weight, bias),
        n,
        sums,
    )
    _launch_pass("input_gradient", triton_tiling.elementwise(at), tensors, eps, relu is not None)
    return dx, dresidual


def unpacked(bits: Tensor, x: Tensor, rows: bool) -> Tensor:
    """The bits of :func:`normalize`, laid out by ``rows``, as bools of the shape of ``x``; by torch alone."""
    n, c, s = x.shape[0], x.shape[1], memory_format.positions(x)
    columns = c if rows else s
    each = (bits.view(-1, -(-columns // 8), 1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    matrix = each.bool().flatten(1)[:, :columns]
    if rows:
        return matrix.reshape(n, *x.shape[2:], c).movedim(-1, 1)
    return matrix.reshape(x.shape)


@lru_cache(maxsize=64)
def _as_two_float32(number: float) -> tuple[float, float]:
    """A number as the sum of two float32 numbers: Triton passes numbers to kernels as float32."""
    first: float = struct.unpack("f", struct.pack("f", number))[0]
    return first, number - first


_BLOCK = 128  # channels of a program that computes per channel


def _blocks(channels: int) -> tuple[int, int, int]:
    return -(-channels // _BLOCK), 1, 1


def _launch_pass(
    name: str, tiles: triton_tiling.Tiling, tensors: tuple[Tensor | None, ...], eps: float, relu: bool
) -> None:
    """Starts a pass over the data."""
    numbers = (float(eps), *tiles.numbers, relu)
    _launch(name, (tiles.columns, tiles.splits, 1), tensors, numbers, (tiles.kind, relu), _WARPS)


def _merge(
    partial: Tensor,
    tiles: triton_tiling.Tiling,
    out: Tensor,
    number: Tensor | None,
    rounded: Tensor | None,
    count: int,
) -> None:
    width, a, b = len(out), min(512, triton_tiling.power(tiles.parts)), 8
    grid = (-(-width // b), 1, 1)
    numbers = (count, tiles.parts, width, a, b)
    _launch(
        "merge", grid, (partial, out, number, rounded), numbers, (*triton_tiling.kind(count, tiles.parts, width), a)
    )


_compiled: dict[Any, Any] = {}


def _launch(
    name: str,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    kind: tuple[Any, ...],
    warps: int = 4,
) -> None:
    """Starts a kernel on the device and the stream of its first tensor.

    Triton's own look-up of the compiled kernel takes longer than the launch. So compiled kernels are kept here, by all
    properties that Triton specializes on: ``kind`` for the numbers, type and alignment for tensors.
    """
    device = tensors[0].device.index  # type: ignore[union-attr]
    seen: list[Any] = [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    if torch.version.hip is not None:  # on AMD Triton also specializes on storages below 2 GiB
        seen += [None if t is None else t.untyped_storage().nbytes() < 2**31 for t in tensors]
    key = (name, device, warps, kind, *seen)
    kernel = _compiled.get(key)
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _start(key, kernel, name, grid, (*tensors, *numbers), warps)
    else:
        _start(key, kernel, name, grid, (*tensors, *numbers), warps)


def _start(
    key: Any, kernel: Any, name: str, grid: tuple[int, int, int], arguments: tuple[Any, ...], warps: int
) -> None:
    if kernel is not None:
        kernel[grid](*arguments)
        return
    kernel = getattr(_triton_kernels(), name)[grid](*arguments, num_warps=warps)
    if kernel is not None:  # the interpreter compiles nothing
        _compiled[key] = kernel


def interprets() -> bool:
    """Whether Triton is installed and interprets its kernels: on the CPU, for tests."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return "Interpreted" in type(_triton_kernels().sums).__name__


@cache
def _triton_kernels() -> ModuleType:
    return importlib.import_module("syncbn.nn.kernels.triton_kernels")


@cache
def _usable(interpreted: bool) -> bool:
    """Whether kernels can be started. If Triton is installed and cannot start one, warns once with the reason."""
    if interpreted:
        return importlib.util.find_spec("triton") is not None
    reason = why_not()
    if reason.startswith("Triton"):
        warnings.warn(f"{reason}: torch's kernels do the layer's work, in more time. {WANTS}", stacklevel=2)
    return not reason


WANTS = "Triton wants a C compiler (CC) and a directory that it may write to (TRITON_CACHE_DIR)."


@cache
def why_not() -> str:
    """Why no kernel can be started on this machine's GPUs; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton"
    devices = range(torch.cuda.device_count() if torch.version.hip is None else 0)
    if any(torch.cuda.get_device_capability(device) < (7, 0) for device in devices):
        return "a GPU is older than Triton's oldest (compute capability 7.0)"
    try:
        _start_smallest_kernel()
    except Exception as error:  # of many classes: no C compiler, no writable cache, a driver that is too old
        line = next(iter(str(error).splitlines()), "")
        return f"Triton cannot start a kernel here ({type(error).__name__}: {line})"
    return ""


def _start_smallest_kernel() -> None:
    """Starts the smallest kernel."""
    device = torch.device("cpu") if interpreted else torch.device("cuda", torch.cuda.current_device())
    sums, out = (torch.zeros(3, dtype=dtype, device=device) for dtype in (torch.float64, torch.float32))
    _triton_kernels().statistics[1, 1, 1](sums, out, 1, _BLOCK)


@cache
def _device(index: int | None) -> tuple[int, int]:
    """The number of processors, and of tiles that a program loads ahead."""
    if index is None:  # the interpreter
        return 2, 1
    properties = torch.cuda.get_device_properties(index)
    copies_asynchronously = torch.version.hip is None and properties.major >= 8
    return properties.multi_processor_count, _STAGES if copies_asynchronously else 1


def _parameters(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.contiguous() for p in parameters]


def _empty(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=x.device)
