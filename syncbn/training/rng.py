"""The random numbers of this process: python's, numpy's and torch's generators, as plain data that checkpoints take."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def state() -> State:
    """Where the generators are, that of this process's GPU too where it is in use."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    found = {
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put_back(state: State) -> None:
    """Takes the generators to where :func:`state` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
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
