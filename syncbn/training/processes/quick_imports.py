"""Imports without garbage collection: a quarter of the time that the import of torch and Lightning takes otherwise."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off, for imports; afterwards it skips all objects that exist by then.

    Modules live as long as the process, so a collection finds nothing in them, but a full one traverses them all. In
    a forked process it would also copy the memory that the process shares with its parent (see :func:`gc.freeze`).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
