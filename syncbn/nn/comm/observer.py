"""A look at what the layers send, for whoever wants to know; while nobody looks, the layers ask once and go on.

Under torch.compile nobody is told anything: the answer would become part of the graph.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Observer(Protocol):
    """What is told of synchronized layers, on the rank that it is on."""

    def measured(self, name: str, local: Tensor, total: Tensor) -> None:
        """A layer has learned what its group's batch is; in a recomputation too.

        Args:
            name: what errors call the layer.
            local: this rank's sums, :func:`syncbn.nn.statistics.pack`'s; the observer's own.
            total: the group's, not to be changed.
        """

    def sending(self, place: str, message: Tensor) -> AbstractContextManager[None]:
        """A context for an exchange, from before it is sent until its result may be used; errors say ``place`` too."""


observer: Observer | None = None  # on this process


def present() -> Observer | None:
    """Who looks, or None."""
    return None if torch.compiler.is_compiling() else observer


def begin(by: Observer) -> None:
    """From now on ``by`` is told."""
    global observer
    observer = by


def end() -> None:
    """Nobody is told any more."""
    global observer
    observer = None
