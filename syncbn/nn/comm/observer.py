"""A hook for tools that measure synchronized layers: their sums, and the time of their all-reduces.

Without an observer it costs one check a call. Under torch.compile it is not called: it would become part of the graph.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Observer(Protocol):
    """Receives the sums and all-reduces of the synchronized layers of this rank."""

    def measured(self, name: str, local: Tensor, total: Tensor) -> None:
        """Called when a layer has the sums of its group's batch; in a recomputation too.

        Args:
            name: what errors call the layer.
            local: this rank's sums, as :func:`syncbn.nn.statistics.pack` returns them; a copy.
            total: the group's sums, not to be changed.
        """

    def sending(self, place: str, message: Tensor) -> AbstractContextManager[None]:
        """A context around an all-reduce, until its result may be used; ``place`` is the name in error messages."""


observer: Observer | None = None  # on this process


def active() -> Observer | None:
    """The observer, or None without one and under torch.compile."""
    return None if torch.compiler.is_compiling() else observer


def install(by: Observer | None) -> None:
    """Replaces the observer; None removes it."""
    global observer
    observer = by
