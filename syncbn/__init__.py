"""Synchronized batch norm for PyTorch, on CPU and GPU, and a toolkit to find out whether it pays.

The layer stands alone and needs torch only::

    import syncbn

    model = syncbn.convert(model)  # every torch batch norm becomes its synchronized twin
    model = DistributedDataParallel(model)

    network = syncbn.load("outputs/RUN")  # a trained network of the toolkit, without Lightning

Training with Lightning is in :mod:`syncbn.training`, which ``import syncbn`` does not import. It costs what
``import torch`` costs, when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.inference.load import load
    from syncbn.nn import *  # its __all__ is the one below, without load

__version__ = "0.1.0"

__all__ = [
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "adapt",
    "broadcast_buffers_once",
    "checkpoint_contexts",
    "convert",
    "debug",
    "load",
    "norm_act",
    "normalization_batch",
    "precise_statistics",
    "revert",
    "shuffle",
    "sync_batch_norm",
]


def __getattr__(name: str) -> Any:
    """Imports torch when first asked for something: the program that starts ranks has work before that."""
    if name == "load":  # a trained network of a run
        return import_module("syncbn.inference.load").load
    if name in __all__ or name == "nn":
        module = import_module("syncbn.nn")
        return module if name == "nn" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
