"""The all-reduce by sum, the only collective of the layers in a step.

Ranks on one host share memory (:mod:`syncbn.nn.comm.shared_memory`). Otherwise it is the process group's own method,
which takes a tenth of a millisecond less than ``dist.all_reduce``. In a dispatch mode either is an operation that the
mode can record; under torch.compile it is torch's functional collective.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from syncbn.nn import torch_internals
from syncbn.nn.comm import c10d, channels, groups, lockstep, observer

_options = dist.AllreduceOptions()
_options.asyncOp = False
forced = False  # see syncbn.testing.force_exchange
_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within this context no rank sends anything: a sum is this rank's values times the number of ranks.

    So the layers normalize with this rank's own batch, even one of a single value per channel.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_alone() -> bool:
    """Whether this is within :func:`alone`."""
    return _alone


def partners(spec: groups.GroupSpec | dist.ProcessGroup, place: str = "sync_batch_norm") -> dist.ProcessGroup | None:
    """The process group to all-reduce over, or None where this rank shares with no other.

    Raises:
        ValueError, RuntimeError: what :func:`syncbn.nn.comm.groups.resolve` raises, after the layer's name, ``place``.
    """
    try:
        group = spec if isinstance(spec, dist.ProcessGroup) else groups.resolve(spec)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"layer {place} forward: {error}") from error
    if forced:
        return group or groups.alone()
    return None if group is None or group.size() == 1 else group


def all_sum(x: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
    """The sum of ``x`` over the ranks of ``group``, bitwise the same on each; the host does not wait for a GPU.

    Args:
        x: the same shape and type on every rank; used up.
        group: the ranks.
        place: the layer and the direction, for errors.

    Raises:
        RuntimeError: the all-reduce failed, a rank is at another layer (see :mod:`syncbn.nn.comm.lockstep`), or this
            runs within a ``join()`` of DistributedDataParallel that cannot work; it names the layer.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _alone:
        return x.mul_(group.size())
    if problem := _join_problem():
        raise RuntimeError(f"layer {place}: {problem}")
    if compiling:
        return c10d.functional_all_reduce(x, group)
    lockstep.check_in_step(x, group, place)
    try:
        if observer.observer is None:
            return _run(x, group, place)
        with observer.observer.sending(place, x):
            return _run(x, group, place)
    except RuntimeError as error:
        raise RuntimeError(f"layer {place}: {error}") from error


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


@c10d.constant_in_graphs
def _join_problem() -> str:
    """Why this layer cannot run in the ``join()`` around it; empty if it can. A graph checks once, when it is traced.

    A rank that ran out of batches takes part in DistributedDataParallel's all-reduces, and not in the layers'.
    """
    join = c10d.active_join()
    if join is None or (join.throw_on_early_termination and join.is_first_joinable):
        return ""
    works = "use join(throw_on_early_termination=True), or give each rank as many batches (N=0 counts) without join()"
    if join.throw_on_early_termination:
        works = "list the DistributedDataParallel first in Join([...])"  # only the first one checks before each batch
    return f"join(): a rank out of batches would skip this layer's all-reduce; {works}"


def _run(x: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
    watched = torch_internals.is_in_dispatch_mode()  # selective checkpointing, for example, keeps what it sees
    if x.is_cpu and (channel := channels.channel(group)) is not None and channel.takes(x):
        if watched:
            total: Tensor = channels.OPERATION(x, group.group_name, place)
            return total
        channel.all_sum(x, place)
        return x
    if watched:
        return c10d.functional_all_reduce(x, group)
    if torch_internals.profiler_is_active():
        with torch.profiler.record_function(f"syncbn::allreduce in a process group, {list(x.shape)} of double"):
            return _through(group, x)
    return _through(group, x)


def _through(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    work = group.allreduce([x], _options)  # what dist.all_reduce calls, without its checks
    if work is not None:
        work.wait()
    return x
