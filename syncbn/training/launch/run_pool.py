"""Runs several runs in parallel, each with its own rank processes; a study runs its jobs this way."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.training.checkpoint import continue_run
from syncbn.training.config.plan import Plan
from syncbn.training.distributed.signals import Interrupted
from syncbn.training.errors import SettingError
from syncbn.training.launch import outcome
from syncbn.training.launch.job import rank, record_end
from syncbn.training.launch.outcome import Outcome
from syncbn.training.processes.rank_processes import Ranks, Requests
from syncbn.training.run_directory import lock, record, symlinks
from syncbn.training.terminal import train_log

RESUME_HINT = "the same command resumes it"
OUTPUT_DIR = "${hydra:runtime.output_dir}"


class Run(NamedTuple):
    """One run."""

    plan: Plan
    overrides: list[str]  # of its command line, for run.json

    @property
    def directory(self) -> Path:
        """The run directory; a run that exists in it already is resumed."""
        return self.plan.run_dir


def in_directory(settings: Any, run_dir: str) -> Any:
    """Plain settings of a run, with its directory in place of Hydra's resolver, which has that of the whole command."""
    if isinstance(settings, dict):
        return {key: in_directory(each, run_dir) for key, each in settings.items()}
    if isinstance(settings, list):
        return [in_directory(each, run_dir) for each in settings]
    return settings.replace(OUTPUT_DIR, run_dir) if isinstance(settings, str) else settings


def run_all(
    runs: Sequence[Run], slots: int, requests: Requests, ended: Callable[[Run, Outcome], None]
) -> dict[Path, Outcome]:
    """Performs all of ``runs`` in order, as many in parallel as ``slots`` allows; finished runs are skipped.

    A run that fails or cannot begin does not stop the others. After a signal that asks for a stop, the active runs stop
    with a checkpoint and no further run begins.

    Args:
        runs: to perform, all on this machine.
        slots: rank processes in parallel. A run with more ranks runs alone.
        requests: counts the signals that ask for a stop; its context has to be entered.
        ended: called when a run has ended, and at once for a run that had finished before.

    Returns:
        How each run that was begun has ended, by run directory.
    """
    waiting, outcomes = list(runs), {}
    live: list[tuple[Run, Ranks]] = []
    try:
        while waiting or live:
            if requests.seen:
                waiting = []
            while waiting and (not live or sum(r.plan.devices for r, _ in live) + waiting[0].plan.devices <= slots):
                run = waiting.pop(0)
                begun = _begin(run, None if live else requests)
                if isinstance(begun, Ranks):
                    live.append((run, begun))
                else:
                    outcomes[run.directory] = begun
                    ended(run, begun)
            wait([sentinel for _, ranks in live for sentinel in ranks.sentinels()], timeout=0.1)
            for run, ranks in list(live):
                if not ranks.poll(requests, run.plan.cfg.timeouts.stop):
                    live.remove((run, ranks))
                    outcomes[run.directory] = _end(run, ranks, requests)
                    ended(run, outcomes[run.directory])
    finally:
        for run, ranks in live:  # empty, unless an exception was raised above
            _end(run, ranks, requests)
    return outcomes


def _begin(run: Run, requests: Requests | None) -> Ranks | Outcome:
    """Locks the run directory, writes ``run.json`` and ``config.yaml``, and starts the ranks.

    A signal in ``requests`` interrupts the start. It is None if another run has begun before, so the start takes no
    time. Returns the outcome instead of the ranks if the run has finished before or cannot begin.
    """
    began, held, end = False, False, Outcome("finished")
    try:
        lock.hold(run.directory)
        held = True
        plan = continue_run.continued(run.plan, lambda line: None, run.overrides)
        if plan is not None:
            began = True
            symlinks.detach(run.directory)
            record.begin(plan, run.directory.name, run.overrides, continue_run.begun_from(run.plan))
            train_log.append(run.directory, _heading(run))
            logs = run.directory / "ranks"
            return Ranks(plan.devices, rank, (run.directory,), logs, silent=True, signals=requests)
        record.repair(run.plan, run.directory.name, run.overrides)
    except (Exception, Interrupted) as error:
        text = " ".join(str(error).split())
        end = Outcome("failed", text if isinstance(error, SettingError) else f"{type(error).__name__}: {text}", 1)
        if isinstance(error, Interrupted):
            end = Outcome("interrupted", f"{text}; {RESUME_HINT}", 128 + error.signum)
        with suppress(OSError):  # the disk may be full
            if began and record.read(run.directory, "run").get("status") == "running":
                record.end(run.directory, end.status)
                record.undo_begin(run.directory, refused=False)
    if held:
        lock.release(run.directory)
    return end


def _heading(run: Run) -> str:
    attempt = record.read(run.directory, "run").get("attempt", 1)
    return train_log.heading(attempt, " ".join(["a run of a study:", *run.overrides]))


def _end(run: Run, ranks: Ranks, requests: Requests) -> Outcome:
    """Ends the ranks that still live, records how the run ended, and unlocks its directory."""
    status, refused = "failed", False
    try:
        ranks.close()
        end = outcome.of(ranks.ends(), requests.seen, run.directory, RESUME_HINT)
        status, refused = end.status, end.refused
        if end.message:
            train_log.append(run.directory, f"error: {end.message}")
        return end
    finally:
        record_end(run.directory, status, refused, requests)
