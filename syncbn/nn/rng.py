"""The random numbers of this process: python's, numpy's and torch's generators, as plain data that checkpoints take."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = dict[str, Any]


def state() -> State:
    """Where the generators are, that of this process's GPU too where it is in use."""
    found: State = {
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "torch": torch.get_rng_state(),
    }
    if (
        numpy := sys.modules.get("numpy")
    ) is not None:  # torch does without it, and who has not imported it draws nothing
        kind, keys, *rest = numpy.random.get_state(legacy=True)
        found["numpy"] = [kind, numpy.asarray(keys).tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put_back(state: State) -> None:
    """Takes the generators to where :func:`state` found them."""
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
    """Whatever is drawn within this context, the generators go on after it from where they were before."""
    before = state()
    try:
        yield
    finally:
        put_back(before)
