"""A file on a full disk: the kernel itself says that there is no space left."""

from collections.abc import Callable
from pathlib import Path

import pytest

from syncbn.training import atomic_write


def fill_disk_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the draft of this name, wherever it is written, one that takes no byte."""
    unlinked: Callable[[Path], Path] = atomic_write.unlinked

    def full(path: Path) -> Path:
        unlinked(path)
        if path.name == name:
            path.symlink_to("/dev/full")
        return path

    monkeypatch.setattr(atomic_write, "unlinked", full)
