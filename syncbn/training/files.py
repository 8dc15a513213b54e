"""Writes small files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which then takes the place of ``path``; one that cannot be written leaves the old file alone.

    A process that is killed may leave the draft, under one name for each ``path``: the next one writes over it.
    """
    draft = path.with_name(f".{path.name}")
    try:
        yield draft
        draft.replace(path)
    except OSError:  # no space left, say
        draft.unlink(missing_ok=True)
        raise
