"""Activation checkpointing: keeps the results of forward all-reduces, so that the recomputation sends none."""

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import create_selective_checkpoint_contexts

from syncbn.nn import torch_internals
from syncbn.nn.comm import c10d, channels


def checkpoint_contexts() -> tuple[Any, Any]:
    """Keeps the results of the all-reduces of the first pass, ``2C + 2`` numbers a layer: the recomputation sends none.

    ``torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)``, on all
    ranks alike. torch keeps the results with the region that it will recompute, so regions cannot mix them up. Other
    functional all-reduces in the region, such as those of tensor parallelism, are kept too.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(
        [*c10d.all_reduce_operations(), channels.OPERATION]
    )
    return contexts


def hidden_operations() -> AbstractContextManager[Any]:
    """A context whose operations selective checkpointing does not see.

    torch refuses a recomputation with operations that the first pass did not have, such as restoring a counter.
    """
    return torch_internals.without_dispatch_modes()
