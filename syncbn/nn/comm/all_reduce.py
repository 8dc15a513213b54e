"""The one message: an all-reduce by sum.

As a functional collective where something watches operations, torch.compile first of all; else the process group's own,
which takes a tenth of a millisecond less.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn import torch_internals
from syncbn.nn.comm import c10d, groups, lockstep, observer

_options = dist.AllreduceOptions()
_options.asyncOp = False
forced = False  # see syncbn.testing.force_exchange
_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within this context nothing is sent: a sum is what it would be if every rank held what this one holds.

    So the layers normalize with this rank's own batch, also one of a single value per channel.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def partners(spec: groups.GroupSpec | dist.ProcessGroup, place: str = "sync_batch_norm") -> dist.ProcessGroup | None:
    """The process group to exchange with, or None where there is nobody to exchange with.

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
        RuntimeError: the exchange failed, a rank is somewhere else (see :mod:`syncbn.nn.comm.lockstep`), or this is
            within a ``join()`` of DistributedDataParallel's that cannot work; it names the layer.
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
            return _sent(x, group)
        with observer.observer.sending(place, x):
            return _sent(x, group)
    except RuntimeError as error:
        raise RuntimeError(f"layer {place}: {error}") from error


@c10d.constant_in_graphs
def _join_problem() -> str:
    """Why this layer cannot be in the ``join()`` around it, if it is in one; a graph asks once, when it is traced.

    A rank that ran out of batches takes part in DistributedDataParallel's all-reduces, and not in the layers'.
    """
    join = c10d.active_join()
    if join is None or (join.throw_on_early_termination and join.is_first_joinable):
        return ""
    works = "use join(throw_on_early_termination=True), or give each rank as many batches (N=0 counts) without join()"
    if join.throw_on_early_termination:
        works = "list the DistributedDataParallel first in Join([...])"  # the first one asks before each batch
    return f"join(): a rank out of batches would skip this layer's all-reduce; {works}"


def _sent(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if torch_internals.is_in_dispatch_mode():  # selective checkpointing, for one, keeps the results of what it can see
        return c10d.functional_all_reduce(x, group)
    work = group.allreduce([x], _options)  # as dist.all_reduce calls it, with less around it
    if work is not None:
        work.wait()
    return x
