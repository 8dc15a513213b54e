"""Saves and restores the random number generators of python, numpy and torch, as plain data for checkpoints."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = dict[str, Any]


def state() -> State:
    """The states of the generators, with that of this process's GPU if it is in use."""
    found: State = {
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "torch": torch.get_rng_state(),
    }
    # torch runs without numpy, and a process that has not imported it has drawn no numbers from it.
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state(legacy=True)
        found["numpy"] = [kind, numpy.asarray(keys).tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put_back(state: State) -> None:
    """Restores what :func:`state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "numpy" in state:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def untouched() -> Iterator[None]:
    """Restores the generators at the end of this context."""
    before = state()
    try:
        yield
    finally:
        put_back(before)
