"""Is this machine ready to train? What ``syncbn doctor`` looks at, without training.

Each check is a function that gives rows; one that raises, or does not end, is a row FAILED itself.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from syncbn.doctor import cluster, machine, selftest
from syncbn.doctor.rows import Row, Status, failed, show, to_json, verdict

__all__ = ["Row", "Status", "examine", "show", "to_json", "verdict"]

LIMIT = 120.0  # seconds for one check: Lightning from a slow network disk takes a minute


def examine(
    outputs: Path = Path("outputs"), timeout: float = 120.0, exercise: selftest.Exercise = selftest.exercise
) -> list[Row]:
    """Looks at everything, and runs the self-test.

    Args:
        outputs: the directory that run directories would be made in.
        timeout: seconds for the self-test.
        exercise: what each rank of the self-test does.
    """
    checks: dict[str, Callable[[], list[Row]]] = {
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
    """The rows of ``check``, or one that says that it raised, or did not end within ``limit`` seconds."""
    rows: list[Row] = []

    def run() -> None:
        try:
            rows.extend(check())
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {' '.join(str(error).split())}"
            rows.append(failed(name, found, "report it"))

    thread = threading.Thread(target=run, daemon=True)  # nothing ends a call that waits for a dead file system
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return [failed(name, f"no answer within {limit:g} s", "see whether a file system or the network hangs")]
    return rows
