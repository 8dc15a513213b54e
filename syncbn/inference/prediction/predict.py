"""Implements ``syncbn predict``: starts the ranks, merges their rows in the order of the files, and writes them."""

import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

import torch

from syncbn.inference.prediction import output
from syncbn.inference.prediction.files import Files
from syncbn.inference.prediction.options import Options, RankError
from syncbn.inference.prediction.share import Row, Task, check, rows, work
from syncbn.inference.trained import Trained, open_run
from syncbn.training.config.machine import Machine, this_machine
from syncbn.training.console import print_line
from syncbn.training.distributed.signals import Interrupted
from syncbn.training.errors import SettingError
from syncbn.training.launch import outcome
from syncbn.training.processes.rank_processes import Ranks, Requests

CPU_RANKS = 2  # as trainer.devices=auto


def predict(run: Path, files: Files, options: Options) -> int:
    """Predicts the class of each image file, and writes one row for each.

    Returns:
        The number of files and folders that cannot be read. Each was printed.

    Raises:
        SettingError: the run has no usable checkpoint, or an option cannot work.
        RankError: a rank failed.
        Interrupted: a signal came; no file was written.
    """
    machine = this_machine()
    _check_devices(options.devices, machine)
    trained = open_run(run, trust=options.trust, part=options.part)
    check(trained, run)
    if trained.note:
        print_line(f"{trained.note}; --part '' predicts with the whole module", error=True)
    if trained.classes is not None and options.top > (most := len(trained.classes)):
        raise SettingError("--top", options.top, f"the run has {most} classes; use 1 to {most}")
    task, ranks = _task(run, files, options, machine)
    unreadable = len(files.unreadable)
    for folder, why in files.unreadable:
        print_line(f"cannot be read: {folder} ({why})", error=True)
    columns = output.Columns(files.paths, trained.classes, options.top)
    writing = output.to_terminal(columns) if options.out is None else output.to_file(options.out, columns)
    total = len(files.paths)
    with (
        Requests() as requests,
        writing as write,
        _progress(options.out, total) as step,
        closing(_all_rows(task, trained, ranks, requests)) as found,
    ):
        for row in found:
            if row.error:
                unreadable += 1
                print_line(f"cannot be read: {files.paths[row.file]} ({row.error})", error=True)
            else:
                write(row)
            step()
    if options.out is not None:
        images = total + len(files.unreadable) - unreadable
        others = f"; {files.ignored} files with other suffixes were ignored" if files.ignored else ""
        print_line(f"{images} image{'s' * (images != 1)}: {options.out}{others}")
    return unreadable


def _check_devices(devices: int | None, machine: Machine) -> None:
    most = machine.gpus or max(4 * machine.cores, 8)
    if devices is not None and not 1 <= devices <= most:
        there = f"there are {machine.gpus} GPUs" if machine.gpus else f"there are {machine.cores} CPU cores"
        raise SettingError("--devices", devices, f"{there}; use 1 to {most}")


def _task(run: Path, files: Files, options: Options, machine: Machine) -> tuple[Task, int]:
    """What the ranks do, and their number: no more than there are batches."""
    batches = -(-len(files.paths) // options.batch_size)
    ranks = min(options.devices or machine.gpus or CPU_RANKS, max(batches, 1))
    device, threads = "cuda" if machine.gpus else "cpu", max(1, machine.cores // ranks)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = int(asked) if asked.isdigit() and int(asked) else threads
    task = Task(
        str(run.absolute()), files.paths, options.batch_size, options.top, options.trust, device, threads, options.part
    )
    return task, ranks


def _all_rows(task: Task, trained: Trained, ranks: int, requests: Requests) -> Generator[Row, None, None]:
    if ranks == 1:
        torch.set_num_threads(task.threads)
        with requests.raising():
            yield from rows(task, trained)
        return
    place = Path(tempfile.mkdtemp(prefix="syncbn-predict-"))
    keep = False
    try:
        yield from _of_ranks(task, ranks, requests, place)
    except RankError:
        keep = (place / "error.txt").exists()  # the traceback, which the error names
        raise
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def _of_ranks(task: Task, count: int, requests: Requests, place: Path) -> Iterator[Row]:
    """The rows of all ranks in the order of the files, as they are computed."""
    ranks = Ranks(count, work, (task, str(place)), place / "ranks", silent=True, signals=requests)
    with closing(_Merged(place, count, task)) as merged:
        try:
            while ranks.poll(requests, 0.0) and not requests.seen:
                wait(ranks.sentinels(), timeout=0.1)
                yield from merged.new()
        finally:
            ranks.close()
        if requests.seen:
            raise Interrupted(requests.seen[0])
        yield from merged.new()
    end = outcome.of(ranks.ends(), [], place, "no file was written")
    if end.code:
        raise SettingError("RUN", hint=end.message.removeprefix("RUN: ")) if end.refused else RankError(end.message)


class _Merged:
    """Reads the files of the ranks while they are written, and puts their rows in order.

    Rank r has the batches r, r + W, ...; each rank writes its rows in order.
    """

    def __init__(self, place: Path, ranks: int, task: Task) -> None:
        self._paths = [place / f"{rank}.jsonl" for rank in range(ranks)]
        self._files: list[IO[str] | None] = [None] * ranks
        self._rest = [""] * ranks
        self._waiting: list[deque[Row]] = [deque() for _ in range(ranks)]
        self._next, self._task = 0, task

    def new(self) -> Iterator[Row]:
        """The rows that follow those before, as far as the ranks have written them."""
        self._read()
        while self._next < len(self._task.paths):
            rank = self._next // self._task.batch_size % len(self._waiting)
            if not self._waiting[rank]:
                return
            self._next += 1
            yield self._waiting[rank].popleft()

    def close(self) -> None:
        for file in filter(None, self._files):
            file.close()

    def _read(self) -> None:
        for rank, path in enumerate(self._paths):
            if self._files[rank] is None and path.exists():
                self._files[rank] = path.open(encoding="utf-8")
            if (file := self._files[rank]) is not None:
                *whole, self._rest[rank] = (self._rest[rank] + file.read()).split("\n")
                self._waiting[rank].extend(Row(*json.loads(line)) for line in whole)


@contextmanager
def _progress(out: Path | None, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call for each file; a bar on a terminal, if the rows go into a file."""
    if out is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task)
