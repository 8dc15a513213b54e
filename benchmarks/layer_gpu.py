"""The layer on shapes of a ResNet-50 (a cell is a shape, a batch, a layout and a type), as a GPU is to be measured.

``layer.py --device cuda`` calls it; ``layer.py --device cpu --parts cells`` tries it out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layer_gpu_goals import LOCAL, OURS, OURS_BLOCK, OURS_RELU, SMALL, TORCH, TORCH_BLOCK, TORCH_RELU
from timers import Clock, clock_of, device_seconds, host_seconds
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

import syncbn
from syncbn import testing

SHAPES = [(64, 112, 112), (256, 56, 56), (512, 28, 28), (2048, 7, 7)]
BATCHES = [256, 32, SMALL]
LAYOUTS = [("channels_last", torch.bfloat16), ("contiguous", torch.float32)]
MOMENTUM, EPS = 0.1, 1e-5
ATEN, UNFUSED = "ours by ATen", "ours, add, relu"
COMPILED, COMPILED_BLOCK = "ours compiled", "ours compiled add relu"
COPIES, LONG_COPY = "copies", "long copy"
PEERS = {OURS: (ATEN, TORCH, LOCAL), OURS_RELU: (TORCH_RELU,), OURS_BLOCK: (TORCH_BLOCK, UNFUSED)}
PASSES = {OURS: 8, OURS_RELU: 8, OURS_BLOCK: 10}  # the residual is read forward, its gradient written backward
TENSORS = 30  # of a cell's size, at most, at a time: those of the comparison with float32


class Cell(NamedTuple):
    """What a layer is given: ``shape`` is ``(N, C, H, W)``."""

    shape: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout} {str(self.dtype).removeprefix('torch.')}"


def chosen(device: str, every: bool) -> list[Cell]:
    """All cells or 16 of them: of the smaller batches each shape once, in turn in one layout and in the other.

    On a CPU, where this is only tried out, the smallest.
    """
    return [
        Cell((batch, *shape), *layout)
        for batch in (BATCHES if device == "cuda" else BATCHES[-1:])
        for i, shape in enumerate(SHAPES)
        for j, layout in enumerate(LAYOUTS)
        if every or batch == BATCHES[0] or (i + j + BATCHES.index(batch)) % 2 == 0
    ]


class Data(NamedTuple):
    """A cell's tensors: the input, the gradient of the output, a residual; and the layer's own, float32."""

    x: Tensor
    dy: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


def data_of(cell: Cell, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if cell.layout == "channels_last" else torch.contiguous_format

    def drawn() -> Tensor:
        return torch.randn(cell.shape, generator=generator, device=device, dtype=cell.dtype).to(memory_format=layout)

    channels = cell.shape[1]
    weight, bias = (torch.randn(channels, generator=generator, device=device).requires_grad_() for _ in range(2))
    x, dy, residual = (drawn() for _ in range(3))
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    return Data(x.requires_grad_(), dy, residual.requires_grad_(), weight, bias, mean, var)


def ours(data: Data, act: str | None = None, residual: Tensor | None = None) -> Tensor:
    x, _, _, weight, bias, mean, var = data
    options: dict[str, Any] = {"training": True, "momentum": MOMENTUM, "eps": EPS, "act": act, "residual": residual}
    return syncbn.sync_batch_norm(x, mean, var, weight, bias, **options)


def per_device(data: Data) -> Tensor:
    return F.batch_norm(data.x, data.mean, data.var, data.weight, data.bias, True, MOMENTUM, EPS)


def torchs(data: Data) -> Tensor:
    """What torch.nn.SyncBatchNorm does with more than one rank; with one it would leave all this out. GPUs only."""
    x, _, _, weight, bias, mean, var = data
    group = dist.group.WORLD
    y: Tensor = SyncBatchNorm.apply(x, weight, bias, mean, var, EPS, MOMENTUM, group, dist.get_world_size())
    return y


def _block(layer: Callable[[Data], Tensor]) -> Callable[[Data], Tensor]:
    """With a residual and a ReLU in place, as torchvision's networks have them."""
    return lambda data: F.relu_(layer(data).add_(data.residual))


@dataclass
class Candidate:
    """One way to do it.

    Attributes:
        layer: the forward pass.
        residual: whether the residual takes part.
        relu: whether a ReLU does.
        road: within which both passes run.
    """

    layer: Callable[[Data], Tensor]
    residual: bool = False
    relu: bool = False
    road: Callable[[], AbstractContextManager[None]] = nullcontext

    def passes(self, data: Data) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """The forward and the backward pass, as :func:`timers.device_seconds` takes them.

        Gradients are returned and not kept in ``.grad``, which would copy the one that two inputs share.
        """
        inputs = [data.x, data.weight, data.bias, *([data.residual] if self.residual else [])]

        def forward(_: Any) -> Tensor:
            with self.road():
                return self.layer(data)

        def backward(y: Tensor) -> tuple[Tensor, ...]:
            with self.road():
                return torch.autograd.grad(y, inputs, data.dy)

        return forward, backward


def candidates(device: str) -> dict[str, Candidate]:
    on_gpu = device == "cuda"
    synchronized = {
        TORCH: Candidate(torchs),
        TORCH_RELU: Candidate(lambda data: F.relu_(torchs(data)), relu=True),
        TORCH_BLOCK: Candidate(_block(torchs), residual=True, relu=True),
    }
    return {
        OURS: Candidate(ours),
        ATEN: Candidate(ours, road=testing.without_gpu if on_gpu else testing.without_native),
        LOCAL: Candidate(per_device),
        OURS_RELU: Candidate(lambda data: ours(data, "relu"), relu=True),
        OURS_BLOCK: Candidate(lambda data: ours(data, "relu", data.residual), residual=True, relu=True),
        UNFUSED: Candidate(_block(ours), residual=True, relu=True),
        **(synchronized if on_gpu else {}),
    }


def compiled_candidates() -> dict[str, Candidate]:
    """Ours, and what the compiler makes of it: are its kernels as good?"""
    everything = candidates("cpu")
    pairs = {COMPILED: everything[OURS], COMPILED_BLOCK: everything[OURS_BLOCK]}
    made = {name: torch.compile(c.layer, fullgraph=True, dynamic=False) for name, c in pairs.items()}
    return {name: everything[name] for name in (OURS, OURS_BLOCK)} | {
        name: Candidate(layer, pairs[name].residual, pairs[name].relu) for name, layer in made.items()
    }


def measure(
    cells: list[Cell],
    make: Callable[[], dict[str, Candidate]],
    device: str,
    seconds: float,
    say: Callable[[str], None],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A row a cell, every candidate in turns; ``say`` gets lines of progress, ``keep`` all rows at each change.

    Returns:
        Rows of: shape, layout, dtype, ranks, ``bytes`` of one tensor, rounds; of each candidate ``NAME_us``, the time
        on the device of forward and backward pass; ``A/B``, the ratio of two's times round by round; ``copies_us``, the
        time of four copies of one tensor; ``copy bytes/s``, the bandwidth of a long copy, read and written, and
        ``NAME_bandwidth``, the time of the least memory traffic at that bandwidth as a share of the time; at batch 2
        ``host``, with the same keys for the host's time, and ``launches`` by name, None where the profiler gives
        nothing; ``memory``; ``failed``, reasons by name. ``skipped`` says why there are no figures where that is no
        failure. Spreads are :class:`harness.Spread`.
    """
    clock = clock_of(device)
    rows = []
    for cell in cells:
        say(f"{cell} ...")
        row: dict[str, Any] = {
            "shape": cell.shape,
            "layout": cell.layout,
            "dtype": str(cell.dtype).removeprefix("torch."),
            "bytes": cell.bytes,
            "ranks": dist.get_world_size(),
        }
        try:
            row |= _row(cell, make, device, clock, seconds)
        except Exception as error:  # what was measured before, and what can be after, is not to be lost
            row["failed"] = {"everything": harness.told(error)}
        rows.append(row)
        keep(rows)
    for cell, row in zip(cells, rows, strict=True):  # last: a profiler that has run once slows down every launch
        if device == "cuda" and "host" in row:
            try:
                data = data_of(cell, device)
                tried = {name: candidate for name, candidate in make().items() if name not in row["failed"]}
                row["launches"] = {name: launches(candidate, data) for name, candidate in tried.items()}
            except Exception as error:
                row["failed"]["launches"] = harness.told(error)
            keep(rows)
    return rows


def _row(
    cell: Cell, make: Callable[[], dict[str, Candidate]], device: str, clock: Clock, seconds: float
) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info()[0], TENSORS * cell.bytes
        if free < needed:
            return {"skipped": f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"}
    torch._dynamo.reset()
    data, tried, failed = data_of(cell, device), make(), {}
    for name, candidate in list(tried.items()):
        why = broken(candidate, data)
        if why is not None:
            failed[name] = why
            del tried[name]
    takes = {name: lambda c=c: device_seconds(clock, *c.passes(data)) for name, c in tried.items()}
    long = 2**29 if device == "cuda" else 2**23
    for name, like in ((COPIES, data.x), (LONG_COPY, torch.empty(long, dtype=torch.bfloat16, device=device))):
        takes[name] = _copy(clock, like)
    times = harness.in_turns(takes, seconds)
    bandwidth = 2 * 2 * long / harness.Spread.of(times[LONG_COPY]).median
    times[COPIES] = [4 * copy for copy in times[COPIES]]
    row: dict[str, Any] = {"rounds": len(times[COPIES]), "failed": failed, "copy bytes/s": bandwidth}
    row |= figures(times, (*tried, COPIES))
    for name in [name for name in PASSES if name in tried]:
        row[f"{name}_bandwidth"] = PASSES[name] * cell.bytes / bandwidth * 1e6 / row[f"{name}_us"][0]
    if cell.shape[0] == SMALL:
        takes = {name: lambda c=c: host_seconds(clock, *c.passes(data)) for name, c in tried.items()}
        row["host"] = figures(harness.in_turns(takes, seconds / 4), tried)
    return row | {"memory": {name: memory(candidate, data, device) for name, candidate in tried.items()}}


def figures(times: dict[str, list[float]], names: Any) -> dict[str, harness.Spread]:
    spreads = {f"{name}_us": harness.Spread.of([t * 1e6 for t in times[name]]) for name in names}
    pairs = [(a, b) for a, peers in PEERS.items() for b in peers]
    pairs += [(OURS, COMPILED), (OURS_BLOCK, COMPILED_BLOCK)]
    return spreads | {f"{a}/{b}": harness.ratios(times[a], times[b]) for a, b in pairs if a in times and b in times}


def _copy(clock: Clock, like: Tensor) -> Callable[[], float]:
    source = torch.randn_like(like)  # never zeros, which a GPU moves and computes faster
    target = torch.empty_like(source)
    return lambda: device_seconds(clock, lambda _: target.copy_(source))


def broken(candidate: Candidate, data: Data) -> str | None:
    """Why this one cannot be measured: it fails, or gives something else than float32 and torch's batch norm do."""
    try:
        forward, backward = candidate.passes(data)
        y = forward(None)
        found = [y.detach(), *backward(y)]
    except Exception as error:
        return harness.told(error)
    exact = data._replace(**{name: getattr(data, name).detach().float().requires_grad_() for name in data._fields[:5]})
    z = per_device(exact)
    if candidate.residual:
        z = z + exact.residual
    if candidate.relu:
        z = F.relu(z)
    inputs = [exact.x, exact.weight, exact.bias, *([exact.residual] if candidate.residual else [])]
    # Half precision moves values near zero to the ReLU's other side; a wrong pass is off by far more than this.
    wanted = [z.detach(), *torch.autograd.grad(z, inputs, exact.dy)]
    for what, a, b in zip(("y", "dx", "dweight", "dbias", "dresidual"), found, wanted, strict=False):
        if not float((a.float() - b).norm()) <= 0.08 * float(b.norm()):
            return f"its {what} is not that of torch's batch norm"
    return None


def memory(candidate: Candidate, data: Data, device: str) -> dict[str, int | None]:
    """Bytes: kept for the backward pass, each storage once; and at most allocated on top of the inputs, on a GPU."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    forward, backward = candidate.passes(data)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = forward(None)
    gradients = backward(y)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    del gradients
    return {"kept": sum(kept.values()), "peak": peak}


def launches(candidate: Candidate, data: Data) -> float | None:
    """Kernels, copies and fills that a forward and backward pass give the GPU; None where the profiler sees none."""
    steps = 4
    try:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                forward, backward = candidate.passes(data)
                backward(forward(None))
            torch.cuda.synchronize()
        on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        seen = [e for e in on_gpu if not getattr(e, "is_user_annotation", False) and not e.name.startswith("nccl:")]
    except RuntimeError:
        return None
    return len(seen) / steps or None
