"""The options of ``syncbn predict``."""

from pathlib import Path
from typing import NamedTuple


class RankError(RuntimeError):
    """A rank failed; the message is one line."""


class Options(NamedTuple):
    """The options of ``syncbn predict``."""

    out: Path | None = None
    top: int = 1
    batch_size: int = 64
    devices: int | None = None
    files_from: Path | None = None
    trust: bool = False
    part: str | None = None
