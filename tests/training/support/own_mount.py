"""A file system of its own, for one test and the processes that it starts within."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class OwnMount:
    """It is there for the processes in the namespaces of ``process`` alone (``train(..., within=mount.process)``).

    Attributes:
        place: where they see it.
        process: that keeps it.
    """

    place: Path
    process: int

    @property
    def seen(self) -> Path:
        """Its files, from outside."""
        return Path(f"/proc/{self.process}/root{self.place}")

    def call(self, *command: str) -> None:
        """Runs a command there."""
        inside = ["nsenter", "--user", "--mount", "--preserve-credentials", "--target", str(self.process)]
        subprocess.run([*inside, *command], check=True, timeout=60)


@contextmanager
def own_mount(place: Path, options: str = "") -> Iterator[OwnMount]:
    """Mounts a tmpfs with these options of mount at ``place``, without being root."""
    place.mkdir()
    script = f"mount -t tmpfs {options} tmpfs {place} && echo && exec cat"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"\n"
        yield OwnMount(place, keeper.pid)
        keeper.communicate()
