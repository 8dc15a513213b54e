"""Derives how a run ended from how its ranks ended; composes its error line, and how the user or Slurm resumes it."""

import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from syncbn.training import program
from syncbn.training.atomic_write import unlinked
from syncbn.training.console import print_line
from syncbn.training.distributed import environment, slurm, unresponsive_ranks
from syncbn.training.errors import SettingError
from syncbn.training.processes import out_of_memory
from syncbn.training.processes.rank_processes import End, stopped
from syncbn.training.run_directory import paths, record

REFUSALS = ("SettingError", "AgreedError", "DamagedError")
_NAMES = ("run.id=", "ckpt_path=", "ckpt_restore=", "hydra.run.dir=")  # overrides that identify the run


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        status: for ``run.json``: finished, interrupted or failed.
        message: one line for the user; empty if the run finished.
        code: exit code of the program: 0, 128 + the signal that stopped the run, 1 for any other failure.
        refused: a rank has found that the settings cannot work.
    """

    status: str
    message: str = ""
    code: int = 0
    refused: bool = False


def of(ends: list[End], asked: list[int], run_dir: Path, hint: str) -> Outcome:
    """The outcome of a run.

    Args:
        ends: how each rank ended.
        asked: the signals that this process received while the ranks ran.
        run_dir: tracebacks are written there, and the log of the rank that caused a failure is read from there.
        hint: how to resume the run, for the message.
    """
    if all(end.code == 0 for end in ends):
        return Outcome("finished")
    if any(end.error for end in ends):  # also if a signal asked for a stop as well
        message = _explain(ends, run_dir, hint)
        return Outcome("failed", message, 1, _cause(ends).error.get("kind") in REFUSALS)
    signum = (asked or [end.code - 128 for end in ends if end.code and stopped(end.code)] or [0])[0]
    if not signum:
        return Outcome("failed", _explain(ends, run_dir, hint), 1)
    message = f"stopped by {signal.Signals(signum).name}"
    if not all(stopped(end.code) or end.code == 0 for end in ends):
        message += ", some ranks in the middle of a step"
    return Outcome("interrupted", f"{message}; {hint}", 128 + signum)


def failure(error: dict[str, Any], trace: Path | None, cause: str = "") -> str:
    """Describes an exception, as :func:`syncbn.training.processes.rank_error.describe` returns it, as part of a line.

    The file with its traceback is None if it could not be written. What led to the exception is printed before it.
    """
    message = f"{error['kind']}: {' '.join(error['message'].split())[:600]}"
    place = f"{paths.short(Path(error['place']))}, " if error.get("place") else ""
    place += f"traceback: {paths.short(trace) if trace else 'not written; HYDRA_FULL_ERROR=1 prints it'}"
    return f"{cause} ({message}, {place})" if cause else f"{message} ({place})"


def _how_it_died(end: End) -> str:
    """Describes the end of a rank that has reported no exception."""
    if end.code is None:
        return "ended with an unknown exit code: the fork server was killed before it ended"
    if end.code >= 0:
        return f"ended with exit code {end.code}"
    died = f"was killed by {signal.Signals(-end.code).name}"
    if end.short_of_memory:
        return f"{died}: the kernel ran out of memory; {out_of_memory.ADVICE}"
    return f"{died}, perhaps for lack of memory (see dmesg)" if end.code == -signal.SIGKILL else died


def _explain(ends: list[End], run_dir: Path, hint: str) -> str:
    """The error line of a failed run, about the rank that caused it. Writes the tracebacks to ``error.txt``."""
    hung, first = [end for end in ends if _is_hung(end)], _cause(ends)
    if unresponsive_ranks.is_timeout(first.error.get("message", "")) and hung:
        waited = f"{hung[0].hung}, and the other ranks timed out waiting for it"
        return f"{_shown_rank(hung[0], ends, run_dir)} {waited}; {hint}"
    if "kind" not in first.error:  # it was killed or aborted: gloo's thread may abort a process that is exiting
        return f"{_shown_rank(first, ends, run_dir)} {_how_it_died(first)}; {hint}"
    if first.error.get("kind") in REFUSALS:
        return " ".join(first.error["message"].split())
    traces = "\n".join(f"rank {end.rank}\n{end.error['trace']}" for end in ends if "trace" in end.error)
    trace: Path | None = run_dir / "error.txt"
    try:
        unlinked(run_dir / "error.txt").write_text(traces, encoding="utf-8", errors="backslashreplace")
    except OSError:  # no space left, for example
        trace = None
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        for line in traces.split("\n"):
            print_line(line, error=True)
    reason = failure(first.error, trace)
    if any(end.short_of_memory for end in ends):
        reason += f"; meanwhile the kernel killed a process because it ran out of memory; {out_of_memory.ADVICE}"
    return f"{_shown_rank(first, ends, run_dir)} failed: {reason}; {hint}"


def _is_hung(end: End) -> bool:
    return end.hung is not None and (end.code or -1) < 0


def _cause(ends: list[End]) -> End:
    """The failed rank that most likely caused the failure of the run.

    The order: ranks that report themselves as the cause, ranks that raised an exception or were killed, ranks that
    exited without a traceback, ranks that only lost the connection to another rank, and ranks that hung: the others'
    errors tell whether they waited for one.
    """

    def distance(end: End) -> tuple[bool, bool, bool, bool, int]:
        message = end.error.get("message", "")
        victim = any(word in message for word in (*unresponsive_ranks.LOST, "gloo", "NCCL", "Socket"))
        silent = (end.code or 0) > 0 and not end.error.get("trace")
        return _is_hung(end), not end.error.get("guilty", False), victim, silent, end.rank

    return min((end for end in ends if end.code != 0), key=distance)


def _shown_rank(end: End, ends: list[End], run_dir: Path) -> str:
    """Names a rank, and prints the last lines of its log, if its output goes to a file."""
    log = run_dir / "ranks" / f"{end.rank}.log"
    if log.exists():
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines()[-5:]:
            print_line(f"rank {end.rank} | {line}", error=True)
    return f"rank {end.rank} of {len(ends)} (pid {end.pid})"


def resume_hint(run_dir: Path) -> str:
    """For an error line: the command that resumes this run."""
    if record.read(run_dir, "run").get("tests"):
        return "the same command tests it again"
    if not (run_dir / "checkpoints" / "last.ckpt").exists():
        return "there was no checkpoint yet"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"the same sweep with hydra.sweep.dir={paths.short(run_dir.parent)} resumes it"
    settings = [*(each for each in sys.argv[1:] if not each.startswith(_NAMES)), _run_setting(run_dir)]
    if environment.launcher() == "srun":
        return f"resume with: {shlex.join([*program.for_slurm(), *settings])}"
    if environment.launcher() == "torchrun":
        return f"resume with: torchrun ... {shlex.join([*program.for_torchrun(), *settings])}, as before"
    return f"resume with: {shlex.join([*program.words(), *settings])}"


def _run_setting(run_dir: Path) -> str:
    """The setting that names this run, ``run.id`` or ``hydra.run.dir``, quoted if Hydra needs it."""
    key, value = "hydra.run.dir", paths.short(run_dir)
    if run_dir.resolve() == Path("outputs", run_dir.name).resolve():
        key, value = "run.id", run_dir.name
    return f"{key}={value}" if re.fullmatch(r"[A-Za-z0-9_./+@-]+", value) else f"{key}='{value}'"


def requeue_message(stop: object) -> str:
    """For an error line: that the job of this run is in Slurm's queue again."""
    return f"{stop}: job {slurm.job()} is requeued and will resume from its last checkpoint"


def is_requeued() -> bool:
    """Whether this process is the batch script of a job that Slurm starts again."""
    if slurm.job() is None or slurm.is_interactive():
        return False
    try:
        return slurm.was_requeued()
    except SettingError:  # no scontrol here
        return False
