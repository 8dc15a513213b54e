"""The profiler of ``debug=profile``: torch's, over a few training steps, as a table and as a trace for Perfetto."""

import os
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from syncbn.training.atomic_write import replacing
from syncbn.training.console import print_line
from syncbn.training.errors import SettingError

STEP = "run_training_batch"  # what Lightning 2.6 calls a training step
# Names of events that are spans around others, and not work of their own.
SPANS = re.compile(r"ProfilerStep|lightning/|Optimizer\.|DistributedDataParallel\.forward$|autograd::engine")
LAYERS, GRADIENTS = "all-reduces of the batch norm layers", "all-reduces of the gradients"
# The events of syncbn.nn.comm, and the operator of torch that all-reduces through a process group.
LAYER, AVERAGING, TORCHS = "syncbn::allreduce", "syncbn::averaging gradients", "c10d::allreduce_"


class Row(NamedTuple):
    """An operator, in all recorded steps."""

    name: str
    calls: int
    cpu: float  # seconds of the operator itself, without those that it calls
    gpu: float


class StepProfiler(Profiler):
    """Records ``active`` training steps with torch's profiler, after ``wait`` steps, and ``warmup`` of its own.

    Each rank writes ``trace-RANK.json.gz``, which https://ui.perfetto.dev opens, and ``profile-RANK.txt``, a table of
    the operators by time; rank 0 prints it. What Lightning does around the operators is in the trace: hooks of
    callbacks, loading of batches.

    Args:
        dirpath: where the files are written.
        wait: steps before, which are slower: memory is allocated, algorithms are chosen.
        warmup: steps that are recorded and thrown away: the profiler's own first steps are slow.
        active: steps that are recorded.
        rows: operators in the table.
        record_shapes: the shapes of the operators' inputs too.
        with_stack: the line of Python code that calls an operator too; it costs time, and makes the trace larger.

    Raises:
        SettingError: a number of steps below 1 (``wait``: 0), or of rows.
    """

    def __init__(
        self,
        dirpath: str,
        wait: int = 4,
        warmup: int = 2,
        active: int = 4,
        rows: int = 20,
        record_shapes: bool = False,
        with_stack: bool = False,
    ) -> None:
        super().__init__(dirpath=dirpath)
        for name, value, least in (("wait", wait, 0), ("warmup", warmup, 1), ("active", active, 1), ("rows", rows, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"trainer.profiler.{name}", value, f"use a whole number, {least} or more")
        self.active, self.rows, self.needed = active, rows, wait + warmup + active
        self._schedule = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        self._options: dict[str, Any] = {"record_shapes": record_shapes, "with_stack": with_stack}
        self._profile: profile | None = None
        self._steps, self._done = 0, False
        self._open: dict[str, record_function] = {}

    def start(self, action_name: str) -> None:
        if action_name == STEP and self._profile is None and not self._done:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(
                activities=activities, schedule=self._schedule, on_trace_ready=self._write, **self._options
            )
            self._profile.start()
        if self._profile is not None:
            span = record_function(f"lightning/{action_name}")
            span.__enter__()
            self._open[action_name] = span

    def stop(self, action_name: str) -> None:
        if (span := self._open.pop(action_name, None)) is not None:
            span.__exit__(None, None, None)
        if action_name == STEP and self._profile is not None:
            self._steps += 1
            self._profile.step()
            if self._steps >= self.needed:
                self._close()

    def teardown(self, stage: str | None) -> None:
        if stage == "fit" and not self._done and self._steps:
            print_line(
                f"trainer.profiler: training ended after {self._steps} steps, and a profile needs {self.needed}: none "
                "was written; use smaller trainer.profiler.wait, warmup and active",
                error=True,
            )
            self._close()
        super().teardown(stage)

    def _close(self) -> None:
        for span in reversed(self._open.values()):
            span.__exit__(None, None, None)
        self._open.clear()
        self._done = True
        if self._profile is not None:
            self._profile.stop()
        self._profile = None

    def _write(self, recorded: profile) -> None:
        if self._steps < self.needed:  # torch writes what it has when a profile is stopped early
            return
        rank, directory = int(os.environ.get("RANK", "0")), Path(str(self.dirpath))
        lines = table(rows_of(recorded), self.active, self.rows)
        with suppress(OSError), replacing(directory / f"trace-{rank}.json.gz") as draft:
            recorded.export_chrome_trace(str(draft))
        with suppress(OSError), replacing(directory / f"profile-{rank}.txt") as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if rank == 0:
            for line in lines:
                print_line(line)
            print_line(f"open trace-{rank}.json.gz at https://ui.perfetto.dev; the table is in profile-{rank}.txt")


def rows_of(recorded: Any) -> list[Row]:
    """The operators of a profile with their own times.

    All-reduces of different sizes are together. Those of the layers are with the operator of torch that they call, so
    that the row of this operator is of other all-reduces alone.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for each in recorded.key_averages():
        if SPANS.search(each.key):
            continue
        own, gpu = each.self_cpu_time_total / 1e6, each.self_device_time_total / 1e6
        if each.key.startswith(LAYER):
            inner = each.cpu_time_total / 1e6 - own
            _add(found[LAYERS], each.count, own + inner, gpu)
            _add(found[TORCHS], -each.count if "process group" in each.key else 0, -inner, 0)
        else:
            _add(found[GRADIENTS if each.key.startswith(AVERAGING) else each.key], each.count, own, gpu)
    return [Row(name, int(calls), max(cpu, 0.0), gpu) for name, (calls, cpu, gpu) in found.items() if calls > 0]


def _add(totals: list[float], *more: float) -> None:
    totals[:] = [a + b for a, b in zip(totals, more, strict=True)]


def table(rows: list[Row], steps: int, most: int) -> list[str]:
    """The lines of the table: the operators by their own time, with that of the GPU first if there is one.

    The all-reduces of the layers have a row in any case.
    """
    on_gpu = any(each.gpu for each in rows)
    ordered = sorted(rows, key=lambda each: -(each.gpu if on_gpu else each.cpu))
    chosen = ordered[:most] + [each for each in ordered[most:] if each.name in (LAYERS, GRADIENTS)]
    total_cpu, total_gpu = (max(sum(times), 1e-12) for times in zip(*((e.cpu, e.gpu) for e in rows), strict=True))
    columns = f"{'calls':>8} {'CPU ms':>10} {'CPU %':>7}" + (f" {'GPU ms':>10} {'GPU %':>7}" if on_gpu else "")
    lines = [f"profile of {steps} training steps; each number is per step, without the operators that one calls"]
    lines.append(f"{'operator':<58} {columns}")
    for each in chosen:
        name = each.name if len(each.name) <= 58 else f"{each.name[:57]}…"
        numbers = f"{each.calls / steps:>8.4g} {1e3 * each.cpu / steps:>10.3f} {100 * each.cpu / total_cpu:>7.1f}"
        if on_gpu:
            numbers += f" {1e3 * each.gpu / steps:>10.3f} {100 * each.gpu / total_gpu:>7.1f}"
        lines.append(f"{name:<58} {numbers}")
    totals = f"{'':>8} {1e3 * total_cpu / steps:>10.3f} {'':>7}"
    totals += f" {1e3 * total_gpu / steps:>10.3f}" if on_gpu else ""
    return [*lines, f"{f'all {len(rows)} operators':<58} {totals}".rstrip()]
