"""Checks whether this machine is ready to train, without training: the command ``syncbn doctor``.

Each check is a function that returns rows of the report. A check that raises or does not end becomes a FAILED row.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from syncbn.doctor import cluster, machine, selftest
from syncbn.doctor.rows import Row, Status, failed, show, to_json, verdict

__all__ = ["Row", "Status", "examine", "show", "to_json", "verdict"]

LIMIT = 120.0  # seconds for one check; importing Lightning from a slow network disk takes a minute


def examine(
    outputs: Path = Path("outputs"), timeout: float = 120.0, exercise: selftest.Exercise = selftest.exercise
) -> list[Row]:
    """Run all checks and the self-test of the layer; the rows of the report are in the order of the checks.

    Args:
        outputs: the directory in which run directories would be created.
        timeout: seconds for the self-test.
        exercise: the function that each rank of the self-test runs.
    """
    checks: dict[str, Callable[[], list[Row]]] = {
        "platform": machine.platform_and_build,
        "Python": machine.python,
        "packages": machine.packages,
        "tested versions": machine.newer_than_tested,
        "imports": machine.imports,
        "CPU": machine.processors,
        "GPUs": machine.gpus,
        "backend": machine.backends,
        "compiled passes": machine.passes,
        "GPU kernels": machine.kernels,
        "open files": machine.open_files,
        "shared memory": machine.shared_memory,
        "disk": lambda: machine.disk(outputs),
        "launcher": cluster.launcher,
        "Slurm": cluster.slurm,
        "W&B": cluster.wandb,
    }
    rows = [row for name, check in checks.items() for row in bounded(name, check)]
    return rows + selftest.run(timeout, exercise)


def bounded(name: str, check: Callable[[], list[Row]], limit: float = LIMIT) -> list[Row]:
    """Return the rows of ``check``, or one FAILED row if it raises or does not end within ``limit`` seconds."""
    rows: list[Row] = []

    def run() -> None:
        try:
            rows.extend(check())
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {' '.join(str(error).split())}"
            rows.append(failed(name, found, "report it"))

    # A daemon thread: a call that waits for an unreachable file system cannot be ended, and must not keep the process.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return [failed(name, f"no answer within {limit:g} s", "check whether a file system or the network hangs")]
    return rows
