"""For tests and benchmarks: make the layer take a road that it would not take here."""

from collections.abc import Iterator
from contextlib import contextmanager

from syncbn.nn import exchange, native


@contextmanager
def force_exchange() -> Iterator[None]:
    """Within this context a group of one rank exchanges with itself, so that one process runs the distributed code."""
    before, exchange._forced = exchange._forced, True
    try:
        yield
    finally:
        exchange._forced = before


@contextmanager
def without_native() -> Iterator[None]:
    """Within this context torch's kernels do what compiled code does otherwise, as where there is no C compiler."""
    before, native._disabled = native._disabled, True
    try:
        yield
    finally:
        native._disabled = before
