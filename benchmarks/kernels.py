"""What becomes of the Triton kernels: as the compiler sees them, without a GPU; and pass by pass on one.

    python benchmarks/kernels.py                  registers, spills and widths of loads, for an H100 or H200
    python benchmarks/kernels.py --arch 80        for an A100
    python benchmarks/kernels.py --measure        on a GPU: the bandwidth of each pass, and what other settings give

Prints tables, and writes results/kernels-ARCH.json, with --measure results/passes-cuda.json.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import harness
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from syncbn.nn.kernels import gpu, triton_tiling

# Of ResNet-50: rows of channels (channels_last) in bfloat16, and planes in float32.
CELLS = [
    ((256, 64, 56, 56), "channels_last", torch.bfloat16),
    ((256, 2048, 7, 7), "channels_last", torch.bfloat16),
    ((2, 256, 14, 14), "channels_last", torch.bfloat16),
    ((32, 256, 56, 56), "channels_last", torch.float32),
    ((32, 256, 56, 56), "contiguous", torch.float32),
    ((32, 2048, 7, 7), "contiguous", torch.float32),
]
# What a processor of the architecture has: registers, bytes of shared memory; and how many there are of a usual GPU.
PROCESSOR = {80: (65536, 164 << 10, 108), 90: (65536, 227 << 10, 132), 100: (65536, 227 << 10, 148)}
# Values of a tile, warps, tiles on their way, values of a channel that are few. The first are the layer's, for rows.
SETTINGS = [
    (4096, 8, 3, 2048), (4096, 8, 1, 2048), (4096, 8, 2, 2048), (4096, 8, 4, 2048),
    (2048, 4, 3, 2048), (8192, 8, 3, 2048), (4096, 8, 3, 512), (4096, 8, 3, 8192),
]  # fmt: skip
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int64: "i64",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel, its grid, and what it is given by name."""

    name: str
    grid: tuple[int, ...]
    given: dict[str, Any]
    warps: int


def every_pass(x: Tensor, at: triton_tiling.Shape, added: str) -> Iterator[tuple[str, Any]]:
    """The passes of a training step as calls, in turn; ``added`` is "", "relu" or "residual+relu"."""
    channels = x.shape[1]
    weight, bias, mean, var = (torch.ones(channels, device=x.device) for _ in range(4))
    residual = torch.empty_like(x) if "residual" in added else None
    found = torch.stack([mean, var, torch.zeros_like(mean)])
    sums = torch.ones(2 * channels + 1, dtype=torch.float64, device=x.device)
    dy = torch.empty_like(x)
    bits = None
    if residual is not None:
        bits = torch.empty(at.outer * at.bits_stride, dtype=torch.uint8, device=x.device)
    gate = (bias, bits) if added else None
    if not added:
        tracked = torch.zeros((), dtype=torch.int64, device=x.device)
        yield "sums", lambda: gpu.sums(x, at)
        yield "statistics", lambda: gpu.statistics(sums)
        yield "update_running", lambda: gpu.update_running(mean, var, tracked, sums, 0.1)
    yield "normalize", lambda: gpu.normalize(x, at, found, weight, bias, 1e-5, residual, bool(added))
    yield "gradient_sums", lambda: gpu.gradient_sums(dy, x, at, found, weight, 1e-5, gate)
    yield (
        "input_gradient",
        lambda: gpu.input_gradient(dy, x, at, sums[0], found, weight, sums[1:], 1e-5, gate, bits is not None),
    )


def launches(shape: tuple[int, ...], layout: str, dtype: torch.dtype, added: str, arch: int) -> list[Launch]:
    """What would be started on such a GPU, for tensors that nobody reads."""
    from syncbn.nn.kernels import triton_kernels

    x = torch.empty(
        shape, dtype=dtype, memory_format=getattr(torch, f"{layout}_format", None) or getattr(torch, layout)
    )
    rows = layout == "channels_last"
    n, c, s = shape[0], shape[1], shape[2] * shape[3]
    at = triton_tiling.Shape(
        rows, n * s if rows else n, c, 1 if rows else s, x.element_size(), PROCESSOR[arch][2], gpu._STAGES
    )
    seen: list[Launch] = []

    def note(name: str, grid: Any, tensors: Any, numbers: Any, kind: Any, warps: int = 4) -> None:
        names = [parameter.name for parameter in getattr(triton_kernels, name).params]
        seen.append(Launch(name, grid, dict(zip(names, (*tensors, *numbers), strict=True)), warps))

    usable = mock.patch.object(gpu, "_usable", return_value=True)
    with mock.patch.object(gpu, "_launch", note), mock.patch.object(gpu, "interpreted", True), usable:
        for _, call in every_pass(x, at, added):
            call()
    return seen


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """What the compiler says of a kernel, specialized as it would be at its first launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from syncbn.nn.kernels import triton_kernels

    kernel = getattr(triton_kernels, launch.name)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch.given[parameter.name]
        fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or fixed:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            kind, divides = f"*{_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, divides = "fp32", False
        else:
            kind, divides = "i32" if value < 2**31 else "i64", value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if divides:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})
    ptx = made.asm["ptx"]
    return {
        "kernel": launch.name,
        "programs": launch.grid,
        "shared": made.metadata.shared,
        "wide": len(re.findall(r"(?:ld|st)\.global[.\w]*\.v4\.b32|cp\.async\.cg", ptx)),
        "copies": len(re.findall(r"cp\.async\.c[ga]\.", ptx)),
    } | resources(ptx, arch)


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Registers a thread, and bytes of them that do not fit."""
    ptxas = Path(importlib.util.find_spec("triton").submodule_search_locations[0]) / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx", encoding="utf-8") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stderr
    counts = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    return {name: int(re.search(pattern, said)[1]) for name, pattern in counts.items()}


def report(arch: int, cells: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for (shape, layout, dtype), added in product(cells, ("", "relu", "residual+relu")):
        for launch in launches(shape, layout, dtype, added, arch):
            cell = {"shape": shape, "layout": layout, "dtype": _TYPES[dtype], "added": added}
            found = compiled(launch, arch)
            registers, shared, _ = PROCESSOR[arch]
            room = min(
                registers // (max(found["registers"], 1) * 32 * launch.warps), shared // max(found["shared"], 1024)
            )
            rows.append(cell | found | {"side_by_side": min(room, 2048 // (32 * launch.warps))})
    return rows


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    result = Table()
    for title in ("cell", *columns.values()):
        left = title in ("cell", "kernel", "added", "settings")
        result.add_column(title, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        cell = f"{'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']}"
        result.add_row(cell, *(f"{row[key]:.0f}" if isinstance(row[key], float) else str(row[key]) for key in columns))
    return result


@contextmanager
def settings(tile: int, warps: int, stages: int, few: int) -> Iterator[None]:
    """Within this context passes are dealt out otherwise."""
    dealing = mock.patch.multiple(triton_tiling, _TILE=tile, _FEW={True: few, False: few})
    with mock.patch.multiple(gpu, _WARPS=warps, _STAGES=stages), dealing:
        for known in (triton_tiling.reduction, triton_tiling.elementwise, gpu._device):
            known.cache_clear()
        yield
    for known in (triton_tiling.reduction, triton_tiling.elementwise, gpu._device):
        known.cache_clear()


def microseconds(call: Any, repeats: int = 30) -> harness.Spread:
    """Of the device, with its second-level cache full of something else each time."""
    flush = torch.zeros(256 << 18, dtype=torch.int32, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for begin, end in events:
        flush.sum()  # reads: what is written would be on its way to memory meanwhile
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return harness.Spread.of([begin.elapsed_time(end) * 1e3 for begin, end in events[3:]])


def measured(cells: list[Any]) -> list[dict[str, Any]]:
    """Each pass in each setting, with the share of a copy's bandwidth that it reaches."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    bandwidth = 2 * big.numel() / microseconds(lambda: other.copy_(big)).median
    passes = {"sums": 1, "normalize": 2, "gradient_sums": 2, "input_gradient": 3}
    more = {"normalize": 1, "input_gradient": 1}  # read the residual, write its gradient
    rows = []
    for (shape, layout, dtype), added in product(cells, ("", "relu", "residual+relu")):
        x = torch.randn(shape, device="cuda").to(dtype)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        for tile, warps, stages, few in SETTINGS:
            with settings(tile, warps, stages, few):
                at = gpu.shape(x)
                for name, call in every_pass(x, at, added):
                    if name not in passes:
                        continue
                    least = x.numel() * x.element_size() * (passes[name] + ("residual" in added) * more.get(name, 0))
                    row = {"shape": shape, "layout": layout, "dtype": _TYPES[dtype], "added": added, "kernel": name}
                    row["settings"] = f"tile {tile}, {warps} warps, {stages} stages, few {few}"
                    try:
                        spread = microseconds(call)
                        row |= {"us": spread, "median_us": spread.median}
                        row["percent"] = 100 * least / spread.median / bandwidth
                    except Exception as error:  # a setting that the GPU has no room for
                        row |= {"us": None, "median_us": str(error).splitlines()[0][:60], "percent": "not measured"}
                    rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=tuple(PROCESSOR), default=90, help="compute capability, times ten")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many")
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    parser.add_argument("--out", type=Path, help="the results, as .json")
    args = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit("error: no Triton here; pip install triton")
    if args.measure and not torch.cuda.is_available():
        sys.exit("error: --measure needs a GPU that torch sees; without it, the compiler's view needs none")
    console = Console(width=150)
    if args.measure:
        rows = measured(CELLS[: args.cells])
        columns = {
            "added": "added",
            "kernel": "kernel",
            "settings": "settings",
            "median_us": "µs",
            "percent": "% of a copy",
        }
        result = {"machine": harness.machine("cuda"), "rows": rows}
    else:
        rows = report(args.arch, CELLS[: args.cells])
        columns = {
            "added": "added", "kernel": "kernel", "registers": "registers", "spilled": "spilled bytes",
            "shared": "shared bytes", "copies": "async copies", "wide": "16-byte accesses",
            "side_by_side": "programs side by side",
        }  # fmt: skip
        result = {"arch": f"sm_{args.arch}", "machine": harness.machine("cpu"), "rows": rows}
    console.print(table(rows, columns))
    name = "passes-cuda" if args.measure else f"kernels-sm{args.arch}"
    harness.save(args.out or harness.RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    main()
