"""Suspends torch.compile while hooks are registered in a model: compiled code calls no hooks."""

from typing import Any

import torch

from syncbn.nn import torch_internals

_requests = 0
_stance: Any = None


def run_eagerly() -> None:
    """Runs compiled code eagerly, until :func:`run_as_before` has been called as often as this."""
    global _requests, _stance
    _requests += 1
    # set_stance would import torch._dynamo, which takes seconds; without it nothing is compiled.
    if _stance is None and torch_internals.dynamo_is_imported():
        _stance = torch.compiler.set_stance("force_eager")


def run_as_before() -> None:
    """Undoes one call of :func:`run_eagerly`."""
    global _requests, _stance
    _requests -= 1
    if not _requests and _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None
