"""What synchronizing costs a training: steps of torchvision's ResNet-50 with one batch norm and another.

    python benchmarks/resnet50.py                                       on a GPU
    torchrun --nproc-per-node N benchmarks/resnet50.py                  on N, which share gradients and statistics
    python benchmarks/resnet50.py --device cpu --size 32 --batch 2 --seconds 0.1     tried out on a CPU

A step is forward, backward and SGD with momentum, on random images that lie on the device; weights are float32,
autocast computes in bfloat16, images are channels_last. Prints a table, and writes results/resnet50-DEVICE.json and
.png (resnet50-cuda-N.json with N GPUs).
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layer_gpu_goals import LOCAL, OURS, TORCH, of_training
from layer_gpu_report import BLANK, SEVERAL, UNKNOWN, goals_table
from rich import box
from rich.console import Console
from rich.table import Table
from timers import Clock, clock_of
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.testing import force_exchange

try:
    from torchvision.models.resnet import Bottleneck, ResNet, resnet50
except (ImportError, RuntimeError) as error:  # the second, where it does not go with this torch
    sys.exit(f"error: torchvision's ResNet-50 is what is trained here: install torchvision for this torch ({error})")

FUSED, COMPILED, GRAPH = "ours fused", "ours compiled", "ours fused, CUDA graph"
IN_A_ROW = 3  # steps that are timed together: in a training the host is ahead, where nothing makes it wait
ALIKE = 0.05  # how far the first loss may be from that of per-device batch norm: bfloat16 is off by less


class TorchsSynchronized(nn.BatchNorm2d):
    """torch.nn.SyncBatchNorm as it is with more than one rank; with one it would leave the exchange out. GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        group, ranks = dist.group.WORLD, dist.get_world_size()
        parameters = (self.weight, self.bias, self.running_mean, self.running_var)
        y: Tensor = SyncBatchNorm.apply(x, *parameters, self.eps, self.momentum, group, ranks)
        return y


class FusedBottleneck(Bottleneck):
    """Torchvision's, its residual and its activations given to the batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = syncbn.norm_act(self.bn1, self.conv1(x))
        y = syncbn.norm_act(self.bn2, self.conv2(y))
        return syncbn.norm_act(self.bn3, self.conv3(y), residual=identity)


class FusedResNet(ResNet):
    """Torchvision's, the stem's activation given to its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.maxpool(syncbn.norm_act(self.bn1, self.conv1(x)))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(torch.flatten(self.avgpool(y), 1))


def torchs_synchronized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = TorchsSynchronized
    return model


def fused(model: nn.Module) -> nn.Module:
    syncbn.convert(model)
    for module in model.modules():
        module.__class__ = {ResNet: FusedResNet, Bottleneck: FusedBottleneck}.get(type(module), type(module))
    return model


def compiled(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(syncbn.convert(model), dynamic=False)
    return compiled


class Training:
    """A network, its optimizer and one batch.

    Args:
        change: makes of torchvision's network the one to measure.
        device: "cpu" or "cuda".
        batch: images a rank.
        size: their height and width.
    """

    def __init__(self, change: Callable[[nn.Module], nn.Module], device: str, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.model = change(resnet50()).to(device, memory_format=torch.channels_last)
        if dist.get_world_size() > 1:
            self.model = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), device=device)
        self.device = device

    def step(self) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def eager(change: Callable[[nn.Module], nn.Module], *where: Any) -> tuple[Callable[[], Any], float]:
    """A step, warmed up; and the first loss."""
    training = Training(change, *where)
    losses = [float(training.step()) for _ in range(3)]
    return training.step, losses[0]


def captured(change: Callable[[nn.Module], nn.Module], *where: Any) -> tuple[Callable[[], Any], float]:
    """The same, the whole step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training = Training(change, *where)
        losses = [float(training.step()) for _ in range(11)]  # so many until DistributedDataParallel has settled
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    training.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # NCCL's thread asks the GPU
        loss = training.step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    if not bool(replay().isfinite()):
        raise RuntimeError(f"a replayed step has a loss of {float(loss)}")
    replay.keeps = training  # type: ignore[attr-defined]  # what the graph reads and writes
    return replay, losses[0]


CANDIDATES: dict[str, tuple[Callable[..., Any], Callable[[nn.Module], nn.Module]]] = {
    LOCAL: (eager, lambda model: model),
    TORCH: (eager, torchs_synchronized),
    OURS: (eager, syncbn.convert),
    FUSED: (eager, fused),
    COMPILED: (eager, compiled),
    GRAPH: (captured, fused),
}
NEED_GPU = (TORCH, GRAPH)


def measure(names: list[str], device: str, batch: int, size: int, seconds: float, console: Console) -> dict[str, Any]:
    """One row: of each candidate ``NAME_images/s``, ``NAME/per-device``, the ratio round by round, and ``peak`` bytes.

    ``failed`` says why there is nothing of a candidate.
    """
    row = {"batch": batch, "size": size, "ranks": dist.get_world_size(), "failed": {}}
    try:
        _into(row, names, device, seconds, console)
    except Exception as error:  # what was measured before is not to be lost
        row["failed"]["everything"] = harness.told(error)
    return row


def _into(row: dict[str, Any], names: list[str], device: str, seconds: float, console: Console) -> None:
    batch, size, failed = row["batch"], row["size"], row["failed"]
    if device == "cuda":
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    clock = clock_of(device)
    steps: dict[str, Callable[[], Any]] = {}
    losses: dict[str, float] = {}
    for name in names:
        if device == "cpu" and name in NEED_GPU:
            continue
        try:
            with console.status(f"{name}, batch {batch}"):
                make, change = CANDIDATES[name]
                steps[name], losses[name] = make(change, device, batch, size)
            off = abs(losses[name] / losses.get(LOCAL, losses[name]) - 1)
            if not off <= ALIKE:
                raise RuntimeError(f"its first loss is {losses[name]:.3f}, that of {LOCAL} {losses[LOCAL]:.3f}")
        except Exception as error:  # the others are not to be lost
            steps.pop(name, None)
            failed[name] = harness.told(error)
    row["first loss"] = losses

    def timed(name: str) -> float:
        """NaN once the candidate has failed, which keeps its turns: ranks take them together."""
        try:
            return seconds_a_step(clock, steps[name]) if name in steps else math.nan
        except Exception as error:
            failed[name] = harness.told(error)
            del steps[name]
            return math.nan

    times = harness.in_turns({name: partial(timed, name) for name in steps}, seconds)
    row["rounds"] = min(map(len, times.values()), default=0)
    for name in steps:
        row[f"{name}_images/s"] = harness.Spread.of([row["ranks"] * batch / t for t in times[name]])
        if LOCAL in steps:
            row[f"{name}/{LOCAL}"] = harness.ratios(times[LOCAL], times[name])
    if device == "cuda":
        row["peak"] = {}
        for name in [name for name in steps if name != GRAPH]:  # which has its own memory
            try:
                row["peak"][name] = peak(steps[name])
            except Exception as error:
                failed[f"{name}, peak"] = harness.told(error)


def seconds_a_step(clock: Clock, step: Callable[[], Any]) -> float:
    clock.wait()
    start = clock.mark()
    for _ in range(IN_A_ROW):
        step()
    end = clock.mark()
    clock.wait()
    return clock.between(start, end) / IN_A_ROW


def peak(step: Callable[[], Any]) -> int:
    """Bytes that a step allocates at most, on top of what it finds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(row: dict[str, Any]) -> Table:
    ranks = f"{row['ranks']} ranks of {row['batch']}" if row["ranks"] > 1 else f"batch {row['batch']}"
    title = f"A training step of ResNet-50, {ranks}, images of {row['size']}. Median (middle 80 %)"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, column in enumerate(("batch norm", "images/s", f"of {LOCAL}", "peak GB")):
        result.add_column(column, justify="right" if i else "left")
    for name in CANDIDATES:
        rate, ratio = row.get(f"{name}_images/s"), row.get(f"{name}/{LOCAL}")
        if rate is None:
            result.add_row(name, UNKNOWN, "", "")
            continue
        bytes_at_most = row.get("peak", {}).get(name)
        result.add_row(
            name,
            "{:,.0f} ({:,.0f}-{:,.0f})".format(*rate),
            BLANK if ratio is None else "{:.3f} ({:.3f}-{:.3f})".format(*ratio),
            BLANK if bytes_at_most is None else f"{bytes_at_most / 1e9:.2f}",
        )
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Images/s as a share of those with per-device batch norm."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, row in enumerate(rows):
        at = [(k, row.get(f"{name}/{LOCAL}")) for k, name in enumerate(CANDIDATES)]
        known = [(k + 0.8 * (i + 0.5) / len(rows) - 0.4, spread) for k, spread in at if spread is not None]
        error = [[s[0] - s[1] for _, s in known], [s[2] - s[0] for _, s in known]]
        middles = [s[0] for _, s in known]
        bars = axis.barh([k for k, _ in known], middles, 0.75 / len(rows), xerr=error, label=f"batch {row['batch']}")
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel(f"images/s, share of {LOCAL}")
    axis.set_yticks(range(len(CANDIDATES)), CANDIDATES)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend()
    machine = result["machine"]
    figure.suptitle(f"ResNet-50, bf16 autocast, channels_last, on {machine['device']}, torch {machine['torch']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batch", nargs="+", type=int, default=[256, 32], help="images a step and rank")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    parser.add_argument("--seconds", type=float, default=15.0, help="to measure each batch for (default 15)")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="default: all")
    parser.add_argument("--out", type=Path, help="the results, as .json and .png (default results/resnet50-DEVICE)")
    args = parser.parse_args()
    harness.keep_memory()
    warnings.filterwarnings("ignore", module="torch._inductor")
    warnings.filterwarnings("ignore", message="`broadcast_buffers`")  # its successor is not in torch 2.11
    rank, ranks = harness.together(args.device)
    torch.backends.cudnn.benchmark = True
    console = Console(width=120, quiet=rank > 0)
    rows: list[dict[str, Any]] = []
    out = args.out or harness.RESULTS / f"resnet50-{args.device}{f'-{ranks}' if ranks > 1 else ''}"
    result = {"machine": harness.machine(args.device), "steps in a row": IN_A_ROW, "rows": rows}
    for batch in args.batch:
        with force_exchange():
            rows.append(measure(args.candidates, args.device, batch, args.size, args.seconds, console))
        if rank == 0:
            harness.save(out.with_suffix(".json"), result)
        console.print(table(rows[-1]))
        for name, why in rows[-1]["failed"].items():
            console.print(f"{name}: {UNKNOWN}, {why}")
    console.print(goals_table(of_training(rows)))
    if ranks == 1:
        console.print(SEVERAL.format(script="resnet50.py"))
    if rank == 0:
        plot(result, out.with_suffix(".png"))
    sys.stdout.flush()
    os._exit(any(row["failed"] for row in rows))  # NCCL may wait for ever to part from what a graph has captured


if __name__ == "__main__":
    main()
