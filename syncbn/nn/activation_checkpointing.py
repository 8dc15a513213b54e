"""Selective activation checkpointing: without the forward messages a second time, and without being in its way."""

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import create_selective_checkpoint_contexts

from syncbn.nn import torch_internals
from syncbn.nn.comm import c10d


def checkpoint_contexts() -> tuple[Any, Any]:
    """Keeps what was received in the first pass, so that the recomputation sends nothing: ``2C + 2`` numbers a layer.

    ``torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)``, on all
    ranks alike. torch keeps the results of the collectives with the region that it will recompute, so none can be
    taken for another's. Other functional all-reduces in the region (tensor parallelism's) are kept too.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(c10d.all_reduce_operations())
    return contexts


def unseen() -> AbstractContextManager[Any]:
    """For the bookkeeping of a recomputation: torch refuses one with operations that the first pass did not have."""
    return torch_internals.without_dispatch_modes()
