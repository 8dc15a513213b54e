"""Compiled code calls no hooks: whoever has hooks in a model has the process run everything eagerly meanwhile."""

from typing import Any

import torch

from syncbn.nn import torch_internals

_asking = 0
_stance: Any = None


def run_eagerly() -> None:
    """From now on compiled code runs eagerly, until :func:`run_as_before` has been called as often as this."""
    global _asking, _stance
    _asking += 1
    if _stance is None and torch_internals.dynamo_is_imported():  # else nothing is compiled
        _stance = torch.compiler.set_stance("force_eager")


def run_as_before() -> None:
    """Takes back one call of :func:`run_eagerly`."""
    global _asking, _stance
    _asking -= 1
    if not _asking and _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None
