"""Counts the processes that the kernel has killed because memory ran out."""

from contextlib import suppress
from pathlib import Path

ADVICE = "use a smaller data.batch_size, fewer data.num_workers, or a machine or job with more memory"


def kills(root: Path = Path("/")) -> int:
    """How many processes the kernel's out-of-memory killer has killed in this cgroup, or on this machine without one.

    Args:
        root: the directory of ``proc`` and ``sys``; another one for tests.
    """
    return next((count for path in _counters(root) if (count := _count(path)) is not None), 0)


def _counters(root: Path) -> list[Path]:
    """Files with a line ``oom_kill N``: of cgroup version 2 or 1, and of the machine."""
    groups = root / "sys" / "fs" / "cgroup"
    found = []
    with suppress(OSError):
        for line in (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found.append(groups / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(groups / "memory" / path.lstrip("/") / "memory.oom_control")
    return [*found, root / "proc" / "vmstat"]


def _count(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return None
