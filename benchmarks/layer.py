"""What the layer costs: forward and backward pass, against torch's per-device batch norm and a textbook layer.

    python benchmarks/layer.py                    on a GPU, if there is one: see layer_gpu.py for what is measured there
    python benchmarks/layer.py --seconds 0.1      a quick look
    torchrun --nproc-per-node N benchmarks/layer.py --device cuda          with the message between N GPUs
    python benchmarks/layer.py --device cpu --parts cells --seconds 0.1    what is measured on GPUs, tried out on a CPU

Prints tables, and writes results/layer-DEVICE.json (layer-cuda-N.json with N GPUs), which grows row by row and has all
that was measured should the program be ended early, and .png in the end.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import layer_gpu
import layer_gpu_report
import matplotlib as mpl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layer_gpu_goals import of_layer
from naive_layer import textbook
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import syncbn
from syncbn.testing import force_exchange

LARGE = [(16, 64, 56, 56), (32, 128, 16, 16), (8, 256, 14, 14), (16, 2048, 7, 7)]
TINY = [(2, 64, 8, 8), (64, 64)]
MOMENTUM, EPS = 0.1, 1e-5
TITLES = {
    "one_process": "one process, exchange forced",
    "two_ranks": "two ranks, with the message",
    "compiled": "compiled conv-bn-relu",
}
PARTS = {"cpu": tuple(TITLES), "cuda": ("cells", "inductor")}


def per_device(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)


def ours(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return syncbn.sync_batch_norm(x, mean, var, weight, bias, training=True, momentum=MOMENTUM, eps=EPS)


def by_the_book(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return textbook(x, mean, var, weight, bias, MOMENTUM, EPS)


LAYERS = {"per-device": per_device, "ours": ours, "textbook": by_the_book}


def step(layer: Callable[..., Tensor], shape: tuple[int, ...], layout: str, device: str) -> Callable[[], Any]:
    """A forward and a backward pass over data of its own."""
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (_laid_out(torch.randn(shape, generator=generator, device=device), layout) for _ in range(2))
    channels = shape[1]
    weight, var = (torch.ones(channels, device=device) for _ in range(2))
    bias, mean = (torch.zeros(channels, device=device) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def run() -> None:
        layer(x, mean, var, weight, bias).backward(dy)
        for t in inputs:
            t.grad = None

    return run


def copies(shape: tuple[int, ...], layout: str, device: str) -> Callable[[], Any]:
    """The memory traffic without which no batch norm does, as copies.

    Forward it reads x twice (statistics, normalization) and writes y; backward it reads x and dy twice and writes dx:
    8 tensors go by. A copy is 2 of them.
    """
    a, b = (_laid_out(torch.zeros(shape, device=device), layout) for _ in range(2))

    def run() -> None:
        for _ in range(2):
            a.copy_(b)
            b.copy_(a)

    return run


def _laid_out(x: Tensor, layout: str) -> Tensor:
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def one_process(device: str, seconds: float) -> list[dict[str, Any]]:
    """Ours in a group of one with the exchange forced: all of the work, with the shortest of messages."""
    rows = []
    for shape in LARGE + TINY:
        for layout in ("contiguous", "channels_last")[: 1 + (len(shape) == 4)]:
            calls = {name: step(layer, shape, layout, device) for name, layer in LAYERS.items()}
            calls["floor"] = copies(shape, layout, device)
            with force_exchange():
                times = harness.interleaved(calls, seconds)
            rows.append(
                {"shape": shape, "layout": layout, "rounds": len(times["ours"])}
                | {f"{name}_us": harness.Spread.of([t * 1e6 for t in ts]) for name, ts in times.items()}
                | {f"ours/{name}": harness.ratios(times["ours"], times[name]) for name in times if name != "ours"}
            )
    return rows


def two_ranks(rank: int, world_size: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in LARGE:
        for layout in ("contiguous", "channels_last"):
            times = harness.agreed({name: step(layer, shape, layout, "cpu") for name, layer in LAYERS.items()}, rounds)
            rows.append(
                {"shape": shape, "layout": layout, "rounds": rounds}
                | {f"{name}_us": harness.Spread.of([t * 1e6 for t in ts]) for name, ts in times.items()}
                | {f"ours/{name}": harness.ratios(times["ours"], times[name]) for name in times if name != "ours"}
            )
    return rows


def compiled_blocks(device: str, seconds: float) -> list[dict[str, Any]]:
    """Convolution, batch norm and ReLU through torch.compile: do our passes fuse with their neighbours?"""
    rows = []
    for shape in ((16, 64, 56, 56), (8, 256, 14, 14)):
        for layout in ("contiguous", "channels_last"):
            torch._dynamo.reset()
            calls = {}
            for name, change in {"per-device": lambda m: m, "ours": syncbn.convert}.items():
                torch.manual_seed(0)
                block = nn.Sequential(
                    nn.Conv2d(shape[1], shape[1], 3, padding=1, bias=False), nn.BatchNorm2d(shape[1]), nn.ReLU()
                )
                block = change(block).to(device)
                if layout == "channels_last":
                    block = block.to(memory_format=torch.channels_last)
                x, dy = (_laid_out(torch.randn(shape, device=device), layout) for _ in range(2))
                calls[name] = _block_step(torch.compile(block, fullgraph=True), x.requires_grad_(), dy)
            with force_exchange():
                times = harness.interleaved(calls, seconds)
            rows.append(
                {"shape": shape, "layout": layout, "rounds": len(times["ours"])}
                | {f"{name}_us": harness.Spread.of([t * 1e6 for t in ts]) for name, ts in times.items()}
                | {"ours/per-device": harness.ratios(times["ours"], times["per-device"])}
            )
    return rows


def _block_step(block: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    def run() -> None:
        block(x).backward(dy)
        block.zero_grad()
        x.grad = None

    return run


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    names = [key for key in rows[0] if key.endswith("_us")]
    ratios = [key for key in rows[0] if key.startswith("ours/")]
    result = Table(title=f"{title}. Median (middle 80 %)", title_justify="left")
    for column in ("shape", "layout", *(name.replace("_us", " µs") for name in names), *ratios):
        result.add_column(column, justify="left" if column in ("shape", "layout") else "right")
    for row in rows:
        result.add_row(
            "x".join(map(str, row["shape"])),
            row["layout"],
            *(f"{row[name][0]:,.0f}" for name in names),
            *("{:.2f} ({:.2f}-{:.2f})".format(*row[ratio]) for ratio in ratios),
        )
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratios to the per-device batch norm, with their spread; the line at 1 is where synchronizing costs nothing."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parts = [(TITLES[key], result[key]) for key in TITLES if result.get(key)]
    figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 5.2), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[0], parts, strict=True):
        labels = ["x".join(map(str, r["shape"])) + (", c.last" if r["layout"] != "contiguous" else "") for r in rows]
        for offset, (name, color) in enumerate({"ours": "tab:blue", "textbook": "tab:orange"}.items()):
            if f"{name}_us" in rows[0]:
                ratio = [row[f"{name}_us"][0] / row["per-device_us"][0] for row in rows]
                bars = axis.barh(
                    [i - 0.2 + 0.4 * offset for i in range(len(rows))], ratio, 0.38, label=name, color=color
                )
                axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("time / time of per-device batch norm")
        axis.margins(x=0.1)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
    axes[0][0].legend(loc="upper right")
    figure.suptitle(f"Forward + backward on {result['machine']['device']}, torch {result['machine']['torch']}")
    figure.savefig(path, dpi=120)


def on_gpu_shapes(args: argparse.Namespace, console: Console, result: dict[str, Any], save: Callable[[], None]) -> bool:
    """The parts ``cells`` and ``inductor``, into ``result``; whether every candidate could be measured."""

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        result[part] = rows
        save()

    parts = {
        "cells": (layer_gpu.chosen(args.device, args.cells == "all"), lambda: layer_gpu.candidates(args.device)),
        "inductor": (
            layer_gpu.chosen(args.device, True)[2:4],
            layer_gpu.compiled_candidates,
        ),  # the largest that has a residual
    }
    for part in [part for part in parts if part in args.parts]:
        with force_exchange():
            say = Console(stderr=True).print
            layer_gpu.measure(*parts[part], args.device, args.seconds, say, keep=partial(keep, part))
        for shown in layer_gpu_report.tables(part, result[part]):
            console.print(shown)
    if "cells" in result:
        console.print(layer_gpu_report.goals_table(of_layer(result["cells"])))
        if dist.get_world_size() == 1:
            console.print(layer_gpu_report.SEVERAL.format(script="layer.py"))
    return not any(row.get("failed") for part in parts for row in result.get(part, []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each row of a table for (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    every = sorted({*PARTS["cpu"], *PARTS["cuda"]})
    parser.add_argument("--parts", nargs="+", choices=every, help="what to measure (default: what suits the device)")
    parser.add_argument("--cells", choices=("some", "all"), default="some", help="16 of the cells, or all 24")
    parser.add_argument("--out", type=Path, help="the results, as .json and .png (default results/layer-DEVICE)")
    args = parser.parse_args()
    harness.keep_memory()
    warnings.filterwarnings("ignore", module="torch._inductor")
    torch.set_num_threads(1)
    rank, ranks = harness.together(args.device)
    args.parts = args.parts or PARTS[args.device][: 1 if ranks > 1 else None]
    if ranks > 1 and list(args.parts) != ["cells"]:
        sys.exit("error: under torchrun --parts cells alone is measured, which every rank takes part in")
    console = Console(width=160, quiet=rank > 0)
    result: dict[str, Any] = {"machine": harness.machine(args.device), "threads": 1}
    of = f"{args.device}-{ranks}" if ranks > 1 else args.device
    if not set(args.parts) <= set(PARTS[args.device]):  # tried out, and no result of this device
        of = f"{'-'.join(args.parts)}-{of}"
    out = args.out or harness.RESULTS / f"layer-{of}"

    def save() -> None:
        if rank == 0:
            harness.save(out.with_suffix(".json"), result)

    complete = on_gpu_shapes(args, console, result, save)
    if "one_process" in args.parts:
        result["one_process"] = one_process(args.device, args.seconds)
        save()
        title = "One process, the exchange forced; floor: the least memory traffic, as copies"
        console.print(table(title, result["one_process"]))
    if "two_ranks" in args.parts and args.device == "cpu":  # a GPU each would be needed
        result["two_ranks"] = harness.on_ranks(2, two_ranks, max(3, int(args.seconds * 20)))
        save()
        console.print(table("Two ranks of one thread, with the message", result["two_ranks"]))
    if "compiled" in args.parts:
        result["compiled"] = compiled_blocks(args.device, args.seconds)
        save()
        console.print(table("Compiled conv-bn-relu, the exchange forced", result["compiled"]))
    if rank == 0:
        if "cells" in result:
            layer_gpu_report.plot(result, out.with_suffix(".png"))
        elif set(result) & set(TITLES):
            plot(result, out.with_suffix(".png"))
    dist.destroy_process_group()
    sys.exit(not complete)


if __name__ == "__main__":
    main()
