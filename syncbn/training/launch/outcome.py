"""Derives how a run ended from how its ranks ended, and composes the error line about the rank that caused it."""

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.training.atomic_write import unlinked
from syncbn.training.console import print_line
from syncbn.training.distributed import unresponsive_ranks
from syncbn.training.processes import out_of_memory
from syncbn.training.processes.rank_processes import End, stopped
from syncbn.training.run_directory import paths

REFUSALS = ("SettingError", "AgreedError", "DamagedError")


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


def of(ends: list[End], asked: list[int], run_dir: Path, resume_hint: str) -> Outcome:
    """The outcome of a run.

    Args:
        ends: how each rank ended.
        asked: the signals that this process received while the ranks ran.
        run_dir: tracebacks are written there, and the log of the rank that caused a failure is read from there.
        resume_hint: how to resume the run, for the message.
    """
    if all(end.code == 0 for end in ends):
        return Outcome("finished")
    if any(end.error for end in ends):  # also if a signal asked for a stop as well
        return Outcome("failed", _explain(ends, run_dir, resume_hint), 1, _refused(ends))
    signum = (asked or [end.code - 128 for end in ends if end.code and stopped(end.code)] or [0])[0]
    if not signum:
        return Outcome("failed", _explain(ends, run_dir, resume_hint), 1)
    message = f"stopped by {signal.Signals(signum).name}"
    if not all(stopped(end.code) or end.code == 0 for end in ends):
        message += ", some ranks in the middle of a step"
    return Outcome("interrupted", f"{message}; {resume_hint}", 128 + signum)


def _refused(ends: list[End]) -> bool:
    return min((end for end in ends if end.error), key=_distance_to_cause).error.get("kind") in REFUSALS


def failure(error: dict[str, Any], trace: Path | None, cause: str = "") -> str:
    """Describes an exception as part of a line.

    Args:
        error: as :func:`syncbn.training.processes.rank_error.describe` returns it.
        trace: the file with its traceback; None if it could not be written.
        cause: what led to the exception; printed before it.
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


def _explain(ends: list[End], run_dir: Path, resume_hint: str) -> str:
    """The error line of a failed run, about the rank that caused it. Writes the tracebacks to ``error.txt``."""
    for end in ends:
        end.error.setdefault("message", "")
    hung = [end for end in ends if end.hung is not None and (end.code or -1) < 0]
    failed = [end for end in ends if end.code != 0 and end not in hung]
    first = min(failed, key=_distance_to_cause)
    if unresponsive_ranks.is_timeout(first.error["message"]) and hung:
        waited = f"{hung[0].hung}, and the other ranks timed out waiting for it"
        return f"{_shown_rank(hung[0], ends, run_dir)} {waited}; {resume_hint}"
    if "kind" not in first.error:  # it was killed or aborted: gloo's thread may abort a process that is exiting
        return f"{_shown_rank(first, ends, run_dir)} {_how_it_died(first)}; {resume_hint}"
    if first.error.get("kind") in REFUSALS:
        return " ".join(first.error["message"].split())
    traces = "\n".join(f"rank {end.rank}\n{end.error['trace']}" for end in failed if "trace" in end.error)
    trace: Path | None = run_dir / "error.txt"
    try:
        unlinked(run_dir / "error.txt").write_text(traces, encoding="utf-8", errors="backslashreplace")
    except OSError:  # no space left, for example
        trace = None
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        _print_lines(traces)
    reason = failure(first.error, trace)
    if any(end.short_of_memory for end in ends):
        reason += f"; meanwhile the kernel killed a process because it ran out of memory; {out_of_memory.ADVICE}"
    return f"{_shown_rank(first, ends, run_dir)} failed: {reason}; {resume_hint}"


def _distance_to_cause(end: End) -> tuple[bool, bool, bool, int]:
    """Sort key of failed ranks, the likely cause first.

    The order: ranks that report themselves as the cause, ranks that raised an exception or were killed, ranks that
    exited without a traceback, and ranks that only lost the connection to another rank.
    """
    victim = any(word in end.error["message"] for word in (*unresponsive_ranks.LOST, "gloo", "NCCL", "Socket"))
    return not end.error.get("guilty", False), victim, (end.code or 0) > 0 and not end.error.get("trace"), end.rank


def _shown_rank(end: End, ends: list[End], run_dir: Path) -> str:
    """Names a rank, and prints the last lines of its log, if its output goes to a file."""
    log = run_dir / "ranks" / f"{end.rank}.log"
    if log.exists():
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines()[-5:]:
            _print_error(f"rank {end.rank} | {line}")
    return f"rank {end.rank} of {len(ends)} (pid {end.pid})"


def _print_lines(traces: str) -> None:
    for line in traces.split("\n"):
        _print_error(line)


def _print_error(message: str) -> None:
    print_line(message, error=True)
