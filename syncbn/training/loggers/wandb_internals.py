"""The undocumented parts of W&B that syncbn needs: errors, and the files that W&B writes for a run.

Each was read in the version ``TESTED``. ``tests/training/loggers/test_wandb_internals.py`` fails when a later W&B has
moved one. W&B itself is imported where it is needed: the doctor needs the version alone.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

TESTED = "0.31.0"  # the newest W&B that the tests have run with; the doctor reports a newer one
HEADER = 7  # bytes at the beginning of a run's log, before the first record (W&B 0.31)
NUMBER = "_step"  # key in a line of the history: the number of the line (W&B 0.31)
IMPORTED_BY_INIT = "wandb.sdk.launch"  # a module that wandb.init imports; the import is slow (W&B 0.31)


def connection_errors() -> tuple[type[Exception], ...]:
    """The exceptions that a call of W&B raises once W&B's own process has ended.

    ``HandleAbandonedError`` and ``MailboxClosedError`` of ``wandb.sdk.mailbox``, W&B 0.31. Neither derives from a class
    in ``wandb.errors``. Where a later W&B has moved them, a run whose W&B process ends may end with it.
    """
    try:
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    except ImportError:
        return (ConnectionError,)
    return ConnectionError, HandleAbandonedError, MailboxClosedError


def log_of(directory: Path) -> Path:
    """The file with all records of one attempt, ``run-ID.wandb``.

    W&B 0.31. The run of an earlier process has no object with a public attribute for it.
    """
    (log,) = directory.glob("run-*.wandb")
    return log


def has_records(directory: Path) -> bool:
    """Whether anything but the header was written to the log of an attempt.

    W&B 0.31. ``wandb sync`` uploads no run at all where the log of one is empty.
    """
    return log_of(directory).stat().st_size > HEADER


def was_synced(directory: Path) -> bool:
    """Whether ``wandb sync`` has uploaded this attempt: it leaves ``run-ID.wandb.synced``.

    W&B 0.31. No command reports it.
    """
    return bool(list(directory.glob("*.wandb.synced")))


def upload_failed(directory: Path) -> bool:
    """Whether W&B's process gave up before the upload was complete.

    W&B 0.31 reports it in ``logs/debug-internal.log`` only; ``wandb.finish`` returns normally.
    """
    log = directory / "logs" / "debug-internal.log"
    return log.exists() and "filestream: fatal error" in log.read_text(errors="replace", encoding="utf-8")


def history(directory: Path) -> list[dict[str, Any]]:
    """The history lines that one attempt has logged, up to the point where it was killed.

    Empty where W&B's own program is not there or prints something else: a resumed run then sends points twice, which
    is better than a run that cannot be resumed.
    """
    from wandb import Error

    try:
        command = inspect_command(directory)
        printed = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout
        return [json.loads(line)["history"]["item"] for line in printed.splitlines() if '"type":"history"' in line]
    except (ImportError, OSError, Error, ValueError, LookupError, TypeError):
        return []


def inspect_command(directory: Path) -> list[str]:
    """A command that prints the records of an attempt as JSON, up to the point where it was killed.

    W&B 0.31: what ``wandb leet inspect``, which is not documented, runs after two seconds of imports. The public API
    reads runs from the server only.

    Raises:
        WandbCoreNotAvailableError: W&B was installed without its own program.
    """
    from wandb.util import get_core_path

    log = log_of(directory).resolve()
    options = ["--no-observability", "--json"]  # it contacts no server
    return [get_core_path(), "leet", "inspect", *options, "--run-file", str(log), str(log.parent.parent)]
