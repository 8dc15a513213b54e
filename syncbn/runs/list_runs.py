"""Implements ``syncbn runs``."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from syncbn.runs import select, show
from syncbn.runs.config_blocks import ConfigBlocks
from syncbn.runs.differences import differing
from syncbn.runs.find import find, roots
from syncbn.runs.names import Names
from syncbn.runs.read import Run, read
from syncbn.runs.show import Columns
from syncbn.training.console import cell, print_line
from syncbn.training.errors import SettingError
from syncbn.training.processes.quick_imports import no_garbage_collection

METRIC = "test/acc"
SPEED = "images_per_second"
KEPT = 3  # settings that are more important than the time and a second metric, on a narrow terminal


class Options:
    """The options of ``syncbn runs``, as they were typed."""

    def __init__(
        self,
        *,
        sort: str | None = None,
        reverse: bool = False,
        filters: Sequence[str] = (),
        metrics: Sequence[str] = (),
        columns: str | None = None,
        last: int | None = None,
        form: str = "table",
    ) -> None:
        self.sort, self.reverse, self.filters, self.metrics = sort, reverse, filters, metrics
        self.columns, self.last, self.form = columns, last, form


def list_runs(directories: Sequence[Path], options: Options) -> None:
    """Prints the runs below these directories.

    Raises:
        SettingError: a directory does not exist, or an option names what no run has.
    """
    runs = all_runs(roots(directories))
    names = Names(runs)
    shown = _selected(runs, names, options)
    if options.form == "json":
        _print(show.as_json(shown).splitlines())
        return
    columns = _columns(shown, names, options)
    if options.form == "csv":
        _print(show.as_csv(shown, columns).split("\n")[:-1])
    elif not shown:
        print_line("there is no run" if not runs else f"none of {len(runs)} runs meets the filters")
    else:
        _print_table(shown, columns)


def all_runs(directories: Sequence[Path]) -> list[Run]:
    """All runs below these directories, the newest last."""
    blocks = ConfigBlocks()
    with no_garbage_collection():
        return sorted((read(each, blocks) for each in find(directories)), key=lambda run: run.started)


def _selected(runs: Sequence[Run], names: Names, options: Options) -> list[Run]:
    conditions = [select.parse(each, names) for each in options.filters]
    kept = [run for run in runs if all(each.admits(run) for each in conditions)]
    if options.sort is not None:
        kept = select.ordered(kept, names.find("--sort", options.sort))
    if options.reverse:
        kept.reverse()
    if options.last is not None:
        kept = _last(kept, options.last)
    return kept


def _last(runs: list[Run], number: int) -> list[Run]:
    """The runs that started last, in their order."""
    newest = {id(run) for run in sorted(runs, key=lambda run: run.started)[-number:]}
    return [run for run in runs if id(run) in newest]


def _columns(runs: Sequence[Run], names: Names, options: Options) -> Columns:
    metrics = [names.find("--metric", each) for each in options.metrics]
    if options.columns is not None:
        asked = [names.find("--columns", each.strip()) for each in options.columns.split(",") if each.strip()]
        if not asked:
            raise SettingError("--columns", options.columns, "name one or more, separated by commas")
        return Columns(list(dict.fromkeys(["run", *asked, *metrics])), [], error=False)
    by = [] if options.sort is None else [names.find("--sort", options.sort)]
    settings = [each for each in differing(runs) if each not in metrics]
    usual = metrics or _default_metrics(runs)
    order = list(dict.fromkeys(["run", "status", "started", *settings, *usual, *by]))
    wanted = {"run", "status", *metrics, *usual[:1], *by}
    optional = [*settings[:KEPT], *usual[1:2], "started", *settings[KEPT:], *usual[2:]]
    return Columns(
        [each for each in order if each != "error"],
        [each for each in optional if each not in wanted],
        error=any(run.error for run in runs),
    )


def _default_metrics(runs: Sequence[Run]) -> list[str]:
    """The test accuracy, or another metric of the test; the best value of the monitored metric; images per second."""
    there = {name for run in runs for name in run.numbers}
    best = list(dict.fromkeys(name for run in runs for name in run.best))
    test = sorted(name for name in there if name.startswith("test/") and not name.startswith("test/count"))
    tests = [METRIC] if METRIC in there else test[:1]
    return [*tests, *best[:2], *([SPEED] if SPEED in there else [])]


def _print_table(runs: Sequence[Run], columns: Columns) -> None:
    if not sys.stdout.isatty():
        _print(line for line, _ in show.table(runs, columns, None))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for line, status in show.table(runs, columns, show.terminal_width()):
        table_row = cell(line)
        if status in show.STYLES and "status" in columns.order:
            start = line.find(f" {status} ") + 1
            table_row.stylize(show.STYLES[status], start, start + len(status))
        console.print(table_row)


def _print(lines: Sequence[str] | Iterator[str]) -> None:
    for line in lines:
        print_line(line)
