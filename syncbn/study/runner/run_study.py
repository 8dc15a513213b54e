"""Implements ``python train.py +study=NAME``: executes the missing runs of a study and writes its report."""

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from syncbn.study.cells import Cell, order
from syncbn.study.claims import expectations
from syncbn.study.compare import reference_spec
from syncbn.study.compare.runs import run_reader
from syncbn.study.runner import load, remote
from syncbn.study.runner.load import Member
from syncbn.training import program
from syncbn.training.config import compare
from syncbn.training.config.machine import this_machine
from syncbn.training.config.settle import settle
from syncbn.training.console import print_line
from syncbn.training.distributed import environment
from syncbn.training.errors import SettingError
from syncbn.training.launch import run_pool
from syncbn.training.launch.outcome import Outcome
from syncbn.training.launch.run_pool import Run
from syncbn.training.os_errors import explain
from syncbn.training.processes.rank_processes import Requests
from syncbn.training.read_file import DamagedError
from syncbn.training.run_directory import lock, record


class Job(NamedTuple):
    """A run with its study."""

    study: dict[str, Any]
    cell: Cell
    run: Run


def main(cfg: DictConfig) -> None:
    """Executes the study of ``cfg.study`` under Hydra, or lists its runs (``study.dry_run``).

    If a run fails or a setting is invalid, it prints one line and exits with status 1.
    """
    root = Path(HydraConfig.get().runtime.output_dir)
    try:
        _check_launcher()
        study: dict[str, Any] = OmegaConf.to_container(cfg.study, resolve=True)  # type: ignore[assignment]
        overrides = list(HydraConfig.get().overrides.task)
        found = load.of(study, overrides, root)
        jobs = _jobs(found, here=not (study["dry_run"] or study["report_only"]))
        runs = [job.run for job in jobs]
        if study["dry_run"]:
            _list(study, jobs)
            return
        _check_same_settings(runs, study)
        code = 0 if study["report_only"] else _run(study, jobs, root)
        if code < 2:
            from syncbn.study.runner import report

            settings = [each for each in overrides if "study.report_only=" not in each]
            command = shlex.join([*program.name().split(), *settings])
            if study["studies"]:
                report.write_claims(study, found, root / "report", command)
            else:
                report.write(cfg, study, found[0].cells, root, command)
    except (SettingError, OSError) as error:
        said = explain(error, root) if isinstance(error, OSError) else error
        print_line(f"error: {said}", error=True)
        code = 1
    if code:
        sys.exit(code)


def _jobs(found: Sequence[Member], *, here: bool) -> list[Job]:
    """The runs of all studies as one list, sorted as the runs of one study are."""
    jobs = []
    for member in found:
        try:
            runs = compose(member.cells, here=here)
        except SettingError as error:
            if len(found) == 1:
                raise
            raise SettingError("+study", member.study["name"], str(error)) from error
        jobs += [Job(member.study, cell, run) for cell, run in zip(member.cells, runs, strict=True)]
    return sorted(jobs, key=lambda job: order(job.cell))


def compose(cells: Sequence[Cell], *, here: bool = True) -> list[Run]:
    """Composes and settles the settings of each cell as ``train.py`` does with its overrides.

    Raises:
        SettingError: settings cannot be composed, or are invalid. With ``here``, unfinished runs are executed on this
            machine, and it is an error if it cannot do that.
    """
    composed: dict[tuple[str, ...], Any] = {}
    runs, machine = [], this_machine()
    for cell in cells:
        # Composing takes a tenth of a second, so cells that differ only in the seed are composed once.
        key = tuple(each for each in cell.overrides if not each.startswith("seed="))
        if key not in composed:
            with load.composing(f"study.parts.{cell.part}"):
                cfg = hydra.compose(HydraConfig.get().job.config_name, list(key))
                composed[key] = OmegaConf.to_container(cfg, enum_to_str=True)
        cfg = OmegaConf.create(run_pool.in_directory(composed[key], str(cell.directory)))
        assert isinstance(cfg, DictConfig)
        cfg.seed = cell.seed
        # Hundreds of short runs: a picture of each would take a third of their time.
        cfg.plots = "plots=true" in cell.overrides
        if here and record.read(cell.directory, "run").get("status") != "finished":
            remote.refuse(cfg, machine)
            plan = settle(cfg, machine, cell.directory)
        else:
            plan = remote.settle_elsewhere(cfg, machine, cell.directory)
        runs.append(Run(plan, cell.overrides))
    return runs


def _check_launcher() -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise SettingError("-m", hint="a study makes its own runs; leave it out")
    if environment.launcher():
        raise SettingError(
            "+study",
            hint=f"{environment.launcher()} starts the ranks of one run; call {program.name()}, or take the runs that "
            "study.dry_run=true lists",
        )


def _list(study: dict[str, Any], jobs: Sequence[Job]) -> None:
    for job in jobs:
        figures = reference_spec.parse(job.study["parts"][job.cell.part].get("expected", []))
        beside = [str(each) for each in figures if each.is_of(job.cell.side, job.run.plan)]
        print_line(" ".join([remote.command(job.run), *(["  # expected:", "; ".join(beside)] if beside else [])]))
    numbers = sorted(Counter(job.run.plan.world_size for job in jobs).items())
    how = ", ".join(f"{count} of {size} {'process' if size == 1 else 'processes'}" for size, count in numbers)
    print_line(f"study {study['name']}, budget {study['budget']}: {len(jobs)} runs: {how}")


def _check_same_settings(runs: Sequence[Run], study: dict[str, Any]) -> None:
    """Raises an error if the directory contains a run with other settings, and so belongs to another study."""
    for run in runs:
        try:
            before = record.settings(run.directory) or run.plan.cfg
        except DamagedError:  # only this run is affected; its execution reports the error
            continue
        if changes := compare.changes_of(run.plan.cfg, before, compare.HARMLESS):
            raise SettingError(
                "study.directory",
                study["directory"],
                f"its runs were made with other settings ({', '.join(changes)}); use another directory, or the same "
                "settings",
            )


def _run(study: dict[str, Any], jobs: Sequence[Job], root: Path) -> int:
    fails = _expected_failures(jobs)
    runs = [job.run for job in jobs if not _has_failed(job.run.directory, fails[job.run.directory])]
    cores = os.cpu_count() or 1
    slots = study["slots"] or cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // slots)))
    with Requests(lambda signum: print_line("stopping the runs that are under way ...", error=True)) as requests:
        lock.hold(root)
        progress = _Progress(len(runs), root, fails)
        outcomes = run_pool.run_all(runs, slots, requests, progress.ended)
    progress.say()
    if requests.seen:
        left = len(runs) - sum(progress.is_done(run, outcome) for run, outcome in outcomes.items())
        print_line(f"error: stopped with {left} of {len(runs)} runs to do; the same command does them", error=True)
        return 128 + requests.seen[0]
    failed = sum(not progress.is_done(run, outcome) for run, outcome in outcomes.items())
    if failed:
        print_line(f"error: {failed} of {len(runs)} runs failed; the same command does them again", error=True)
    return int(failed > 0)


def _expected_failures(jobs: Sequence[Job]) -> dict[Path, str]:
    """By run directory, a part of the message with which the run is expected to fail; "" if it is to finish."""
    rules = {id(job.study): expectations.parse(job.study) for job in jobs}
    return {job.run.directory: expectations.fails(rules[id(job.study)], job.cell) for job in jobs}


def _has_failed(directory: Path, error: str) -> bool:
    """Whether the run has failed before, as expected: it need not fail again."""
    if not error or not (directory / "run.json").exists():
        return False
    return expectations.is_expected(run_reader.read([directory])[0], error)


class _Progress:
    """Prints the progress every 10 seconds or more, and one line for each failed run.

    A run that fails as expected (``fails``, by run directory) counts as finished.
    """

    def __init__(self, total: int, root: Path, fails: Mapping[Path, str]) -> None:
        self.total, self.root, self.fails, self.ends = total, root, fails, Counter[str]()
        self.began = self.told = time.monotonic()

    def is_done(self, directory: Path, outcome: Outcome) -> bool:
        """Whether the run has ended as it should."""
        error = self.fails[directory]
        return outcome.status == "finished" or bool(error and outcome.status == "failed" and error in outcome.message)

    def ended(self, run: Run, outcome: Outcome) -> None:
        done = self.is_done(run.directory, outcome)
        self.ends["finished" if done else outcome.status] += 1
        if outcome.status == "failed" and not done:
            print_line(f"{run.directory.relative_to(self.root)}: {outcome.message}", error=True)
        if time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            self.say()

    def say(self) -> None:
        failed = f" ({self.ends['failed']} failed)" if self.ends["failed"] else ""
        seconds = time.monotonic() - self.began
        print_line(f"{self.ends['finished']} of {self.total} runs{failed}, {seconds:.0f} s")
