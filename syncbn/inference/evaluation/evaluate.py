"""Implements ``syncbn evaluate`` under Hydra: makes the tests, runs them one after the other, and shows the table."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from syncbn.inference import run_settings
from syncbn.inference.evaluation import table
from syncbn.inference.evaluation.data_sets import OWN, DataSet
from syncbn.inference.evaluation.options import Options
from syncbn.inference.evaluation.pairs import Pair, pairs
from syncbn.inference.evaluation.table import Cell
from syncbn.runs.read import numbers
from syncbn.training.config.machine import this_machine
from syncbn.training.console import print_line
from syncbn.training.errors import SettingError
from syncbn.training.launch import run_pool
from syncbn.training.launch.run_pool import Run
from syncbn.training.os_errors import explain
from syncbn.training.processes.rank_processes import Requests
from syncbn.training.run_directory import lock, record
from syncbn.training.run_directory.paths import run_of, short


def evaluate(cfg: DictConfig, runs: Sequence[str], options: Options) -> None:
    """Tests every checkpoint on every data set, prints one table and writes it into the directory of the tests.

    A test that fails is a cell with its error, and the others go on. Then the exit code is 1.
    """
    root = Path(HydraConfig.get().runtime.output_dir)
    common = list(HydraConfig.get().overrides.task)
    code = 0
    try:
        lock.hold(root)
        data = list(options.data) or [DataSet(OWN, None)]
        found = list(pairs(runs, data, common, root, this_machine(), trust=options.trust))
        cells, code = _run(found)
        if not code:
            code = _show(cells, options, root)
    except (SettingError, OSError) as error:
        print_line(f"error: {explain(error, root) if isinstance(error, OSError) else error}", error=True)
        code = 1
    finally:
        lock.release(root)
    if code:
        sys.exit(code)


def _run(found: Sequence[Pair]) -> tuple[list[Cell], int]:
    """Runs the tests one after the other: each takes all devices that it asks for.

    Returns:
        The cells, and the exit code if a signal ended the evaluation.
    """
    cells: list[Cell] = []
    with Requests(lambda signum: print_line("stopping the test that is under way ...", error=True)) as requests:
        for pair in found:
            error = pair.error
            if pair.plan is not None:
                outcomes = run_pool.run_all([pair.plan], 1, requests, lambda run, outcome: None)
                if requests.seen:
                    signum = requests.seen[0]
                    print_line(f"error: stopped after {len(cells)} of {len(found)} tests", error=True)
                    return cells, 128 + signum
                end = outcomes[pair.plan.directory]
                error = "" if end.status == "finished" else end.message.removesuffix(f"; {run_pool.RESUME_HINT}")
                error += _versions(pair.plan) if error else ""
            result = {} if error or pair.plan is None else record.read_whole(pair.plan.directory, "result")
            directory = None if pair.plan is None else pair.plan.directory
            cells.append(Cell(pair.run, pair.data, _metrics(result), error, directory))
            print_line(cells[-1].line(len(cells), len(found)))
    return cells, 0


def _show(cells: Sequence[Cell], options: Options, root: Path) -> int:
    """Prints and writes the table; returns the exit code."""
    names = table.names(cells, options.metrics)
    table.write(root / "evaluation.csv", cells)
    if options.out is not None:
        table.write(options.out, cells)
    table.show(cells, names)
    print_line(f"{short(root)}/evaluation.csv")
    failed = [cell for cell in cells if cell.error]
    for (run, error), of in _by_error(failed).items():
        print_line(f"{run} on {', '.join(of)}: {error}", error=True)
    if failed:
        print_line(f"error: {len(failed)} of {len(cells)} test{'s' * (len(cells) != 1)} failed", error=True)
    table.check(cells, options.metrics)
    return int(bool(failed))


def _versions(test: Run) -> str:
    """The versions with which the checkpoint was trained, if they are others: a network may have changed since."""
    checkpoint = test.plan.checkpoint
    return "" if checkpoint is None else run_settings.versions(run_of(Path(checkpoint)))


def _by_error(failed: Sequence[Cell]) -> dict[tuple[str, str], list[str]]:
    """The data sets on which a checkpoint failed, by checkpoint and error: a missing checkpoint is one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in failed:
        found.setdefault((cell.run, cell.error.removeprefix(f"{cell.run}: ")), []).append(cell.data)
    return found


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a test: without the peak memory, which is not one of the checkpoint's."""
    return {name: value for name, value in numbers(result).items() if not name.startswith("memory/")}
