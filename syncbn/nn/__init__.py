"""Synchronized batch norm: the layers, the operation, its kernels and all-reduce, and conversion. Imports torch alone.

Bottom up: ``statistics`` (merging), ``comm`` (groups and the all-reduce), ``kernels`` (the passes over the data),
``autograd`` (the differentiable passes), ``functional`` (which of them a batch takes), ``modules`` (the layers),
``conversion``.
"""

from syncbn.nn.adaptation import adapt
from syncbn.nn.batch_planning import normalization_batch
from syncbn.nn.comm.all_reduce import checkpoint_contexts
from syncbn.nn.comm.lockstep import debug
from syncbn.nn.conversion.convert import convert, revert
from syncbn.nn.conversion.ddp_buffers import broadcast_buffers_once
from syncbn.nn.functional import sync_batch_norm
from syncbn.nn.modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, norm_act
from syncbn.nn.population_statistics import precise_statistics
from syncbn.nn.shuffling import shuffle

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
    "norm_act",
    "normalization_batch",
    "precise_statistics",
    "revert",
    "shuffle",
    "sync_batch_norm",
]
