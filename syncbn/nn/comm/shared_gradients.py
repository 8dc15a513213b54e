"""DistributedDataParallel's gradients through memory that the ranks share, where all of them are on one host's CPUs.

A thread reduces one bucket after the other, as gloo's does, while the backward pass continues. A wait within the pass
could deadlock with the all-reduce of a layer, since buckets need not be ready at the same place on each rank.
"""

import ctypes
import queue
import threading
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, but not by name
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.comm import channels, shared_memory
from syncbn.nn.comm.shared_memory import Channel

OPERATION = "syncbn::averaging gradients in shared memory"  # for torch's profiler, which does not see other threads
PIECE = 1 << 22  # bytes that a rank shares at a time; a larger bucket takes several turns
_TYPES = (torch.float32, torch.float64)  # the sum of others would be rounded after each rank
_Task = tuple[Tensor, Any, str]

_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()  # of models, by group


def register(model: DistributedDataParallel) -> bool:
    """Has ``model`` reduce its gradients through shared memory; False, and nothing is changed, where it cannot.

    All ranks call it together, before the first backward pass, for a model without a communication hook. The mean is
    taken in rank order, so it is bitwise the same on each rank and in each run. gloo is used for buckets of half
    precision.

    Raises:
        RuntimeError: some ranks did not come in time.
    """
    group = model.process_group
    if group.size() == 1 or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return False
    count = _counts[group] = _counts.get(group, 0) + 1
    ranks = group.size()
    found = channels.another(group, f"gradients {count}", (ranks + 1) * PIECE)
    if found is None:
        return False
    channel, address = found
    tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    reducer = _Reducer(channel, address, ranks, group.rank())
    threading.Thread(target=_work, args=(tasks, reducer), name="syncbn gradients", daemon=True).start()
    weakref.finalize(model, tasks.put, None)
    model.register_comm_hook((group, tasks), _hook)
    return True


def _hook(
    state: tuple[dist.ProcessGroup, "queue.SimpleQueue[_Task | None]"], bucket: GradBucket
) -> torch.futures.Future[Tensor]:
    group, tasks = state
    gradients = bucket.buffer()
    if gradients.dtype not in _TYPES:
        return default_hooks.allreduce_hook(group, bucket)
    done: torch.futures.Future[Any] = torch.futures.Future()
    with torch.profiler.record_function(f"{OPERATION}, {list(gradients.shape)} of {gradients.dtype}"):
        tasks.put((gradients, done, f"gradients, bucket {bucket.index()}"))
    # An exception in then() reaches DistributedDataParallel as one; set_exception() would hand it over as the result.
    return done.then(_result)


def _result(done: "torch.futures.Future[Any]") -> Tensor:
    result = done.value()
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def _work(tasks: "queue.SimpleQueue[_Task | None]", reducer: "_Reducer") -> None:
    """Averages the queued gradients until it gets None."""
    while (task := tasks.get()) is not None:
        gradients, done, place = task
        try:
            reducer.average(gradients, place)
            done.set_result(gradients)
        except BaseException as error:
            done.set_result(error)
        del task, gradients, done
    reducer.close()


class _Reducer:
    """The memory: a piece for each rank, and one for their mean, of which each rank computes a part.

    Two all-reduces serve as barriers: after the first all ranks have written their pieces, after the second their parts
    of the mean. A rank writes its next piece when it has read the mean, and its next part of the mean when
    all have written their next pieces, so after all have read this one.
    """

    def __init__(self, channel: Channel, address: int, ranks: int, index: int) -> None:
        self._channel, self._ranks, self._index = channel, ranks, index
        self._address, self._size = address, (ranks + 1) * PIECE
        memory = (ctypes.c_byte * self._size).from_address(address)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8).view(ranks + 1, PIECE)

    @torch.no_grad()
    def average(self, gradients: Tensor, place: str) -> None:
        """Replaces ``gradients``, of one dimension, by their mean over the ranks.

        Raises:
            RuntimeError: as :meth:`.shared_memory.Channel.all_sum`.
        """
        place = f"{place} of {gradients.numel()} numbers"
        pieces = self._memory.view(gradients.dtype)
        for piece in gradients.split(pieces.shape[1]):
            count, (*written, mean) = len(piece), pieces.unbind()
            written[self._index][:count].copy_(piece)
            self._wait(place)
            mine = slice(count * self._index // self._ranks, count * (self._index + 1) // self._ranks)
            total = mean[mine].copy_(written[0][mine])
            for other in written[1:]:
                total.add_(other[mine])
            total.div_(self._ranks)
            self._wait(f"{place}, reduced")
            piece.copy_(mean[:count])

    def close(self) -> None:
        """Gives the memory back."""
        del self._memory
        shared_memory.unmap(self._address, self._size)

    def _wait(self, place: str) -> None:
        self._channel.all_sum(torch.zeros(1, dtype=torch.float64, device="cpu"), place)
