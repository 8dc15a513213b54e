"""How a run ended, from how its ranks did: one line, about the rank that it began with."""

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.training.atomic_write import unlinked
from syncbn.training.console import print_line
from syncbn.training.distributed import out_of_memory, unresponsive_ranks
from syncbn.training.distributed.rank_processes import End, stopped
from syncbn.training.run_directory import paths

REFUSALS = ("SettingError", "AgreedError", "DamagedError")


class Outcome(NamedTuple):
    """The end of a run.

    Attributes:
        status: for ``run.json``: finished, interrupted or failed.
        message: one line for the user; empty where it finished.
        code: for the program, by convention: 0, 128 + the signal that stopped it, 1 for anything else.
        refused: its settings cannot work, as a rank has found.
    """

    status: str
    message: str = ""
    code: int = 0
    refused: bool = False


def of(ends: list[End], asked: list[int], run_dir: Path, go_on: str) -> Outcome:
    """What the ends of the ranks come to.

    Args:
        ends: one a rank.
        asked: the signals that this process was sent meanwhile.
        run_dir: tracebacks go there, and the last lines of the rank to blame are shown from there.
        go_on: how to go on with the run, for the line.
    """
    if all(end.code == 0 for end in ends):
        return Outcome("finished")
    if any(end.error for end in ends):  # that it was asked to stop as well is no excuse
        return Outcome("failed", _explain(ends, run_dir, go_on), 1, _refused(ends))
    signum = (asked or [end.code - 128 for end in ends if end.code and stopped(end.code)] or [0])[0]
    if not signum:
        return Outcome("failed", _explain(ends, run_dir, go_on), 1)
    message = f"stopped by {signal.Signals(signum).name}"
    if not all(stopped(end.code) or end.code == 0 for end in ends):
        message += ", some ranks in the middle of a step"
    return Outcome("interrupted", f"{message}; {go_on}", 128 + signum)


def _refused(ends: list[End]) -> bool:
    return min((end for end in ends if end.error), key=_blame).error.get("kind") in REFUSALS


def what(error: dict[str, Any], trace: Path | None, cause: str = "") -> str:
    """An exception as part of a line.

    Args:
        error: as :func:`syncbn.training.distributed.rank_error.about` has it.
        trace: the file with its traceback; None where it could not be written.
        cause: what it came from, to be said first.
    """
    message = f"{error['kind']}: {' '.join(error['message'].split())[:600]}"
    place = f"{paths.short(Path(error['place']))}, " if error.get("place") else ""
    place += f"traceback: {paths.short(trace) if trace else 'not written; HYDRA_FULL_ERROR=1 prints it'}"
    return f"{cause} ({message}, {place})" if cause else f"{message} ({place})"


def _how_it_died(end: End) -> str:
    """A rank that has reported no exception."""
    if end.code is None:
        return "has ended, and with what is not known: the process that ranks are forked from was killed before"
    if end.code >= 0:
        return f"ended with exit code {end.code}"
    died = f"was killed by {signal.Signals(-end.code).name}"
    if end.short_of_memory:
        return f"{died}: the kernel ran out of memory; {out_of_memory.ADVICE}"
    return f"{died}, perhaps for lack of memory (see dmesg)" if end.code == -signal.SIGKILL else died


def _explain(ends: list[End], run_dir: Path, go_on: str) -> str:
    for end in ends:
        end.error.setdefault("message", "")
    hung = [end for end in ends if end.hung is not None and (end.code or -1) < 0]
    failed = [end for end in ends if end.code != 0 and end not in hung]
    first = min(failed, key=_blame)
    if unresponsive_ranks.is_timeout(first.error["message"]) and hung:
        waited = f"{hung[0].hung}, and the others have waited too long for it"
        return f"{_about(hung[0], ends, run_dir)} {waited}; {go_on}"
    if "kind" not in first.error:  # gloo's thread may abort a process that ends
        return f"{_about(first, ends, run_dir)} {_how_it_died(first)}; {go_on}"
    if first.error.get("kind") in REFUSALS:
        return " ".join(first.error["message"].split())
    traces = "\n".join(f"rank {end.rank}\n{end.error['trace']}" for end in failed if "trace" in end.error)
    trace: Path | None = run_dir / "error.txt"
    try:
        unlinked(run_dir / "error.txt").write_text(traces, encoding="utf-8", errors="backslashreplace")
    except OSError:  # no space left, perhaps
        trace = None
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        _show(traces)
    said = what(first.error, trace)
    if any(end.short_of_memory for end in ends):
        said += f"; the kernel has killed a process meanwhile, as it ran out of memory; {out_of_memory.ADVICE}"
    return f"{_about(first, ends, run_dir)} failed: {said}; {go_on}"


def _blame(end: End) -> tuple[bool, bool, bool, int]:
    """Sorts ranks that failed by how near to the cause they are: those that only lost another rank come last."""
    victim = any(word in end.error["message"] for word in (*unresponsive_ranks.LOST, "gloo", "NCCL", "Socket"))
    return not end.error.get("guilty", False), victim, (end.code or 0) > 0 and not end.error.get("trace"), end.rank


def _about(end: End, ends: list[End], run_dir: Path) -> str:
    """Which rank this is; the last that it printed is shown, where it went into a file."""
    log = run_dir / "ranks" / f"{end.rank}.log"
    if log.exists():
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines()[-5:]:
            _say(f"rank {end.rank} | {line}")
    return f"rank {end.rank} of {len(ends)} (pid {end.pid})"


def _show(traces: str) -> None:
    for line in traces.split("\n"):
        _say(line)


def _say(message: str) -> None:
    print_line(message, error=True)
