"""Debug mode: reports ranks that are at different layers, instead of letting them wait until a time-out.

Before each all-reduce every rank of the group writes its layer to the process group's store. A collective could not
carry this: gloo aborts the process if sizes differ between ranks. Each all-reduce then waits for the slowest rank
twice, so it is for finding a fault only.
"""

import os
from collections import defaultdict
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not by name

from syncbn.nn.comm import c10d

_enabled = os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def debug(enabled: bool = True) -> None:
    """Switches debug mode on or off, on every rank alike; ``SYNCBN_DEBUG=1`` in the environment switches it on.

    Ranks out of step then raise RuntimeError on every rank, with the layer that each is at. How long one may wait for
    another is ``SYNCBN_DEBUG_TIMEOUT``, in seconds, 10 if not set.

    Args:
        enabled: whether debug mode is on from now on.
    """
    global _enabled
    _enabled = enabled


def patience(limit: timedelta) -> timedelta:
    """How long ranks wait for each other to make a group: ``limit``, or debug mode's time-out if that is shorter."""
    return min(limit, timedelta(seconds=_seconds())) if _enabled else limit


def enabled() -> bool:
    """Whether debug mode is on."""
    return _enabled


def check_in_step(x: Tensor, group: dist.ProcessGroup, place: str) -> None:
    """In debug mode, raises unless every rank of ``group`` is about to all-reduce a tensor of this size at ``place``.

    Args:
        x: the tensor to all-reduce; its size and type are compared.
        group: the ranks.
        place: the layer, the direction, and anything else that must agree, as shown in the error.

    Raises:
        RuntimeError: on every rank, if they differ or one does not arrive in time.
    """
    if not _enabled:
        return
    call = _calls[group] = _calls.get(group, 0) + 1
    seconds = _seconds()
    store = PrefixStore(f"syncbn/{group.group_name}", c10d.default_store())
    mine = f"{place}, {x.numel()} numbers of {str(x.dtype).removeprefix('torch.')}"
    ranks = dist.get_process_group_ranks(group)
    keys = {rank: f"{call}/{rank}" for rank in ranks}
    store.set(keys[dist.get_rank()], mine)
    try:
        store.wait(list(keys.values()), timedelta(seconds=seconds))
    except RuntimeError:  # each kind of store raises its own subclass
        late = [rank for rank, key in keys.items() if not store.check([key])]
        raise RuntimeError(f"layer {mine}: {_ranks(late)} did not come within {seconds:.0f} s (call {call})") from None
    places: dict[str, list[int]] = defaultdict(list)
    for rank, key in keys.items():
        places[store.get(key).decode()].append(rank)
    if call > 1:  # every rank has arrived, so every rank has read the keys of the previous call
        store.delete_key(f"{call - 1}/{dist.get_rank()}")
    if len(places) > 1:
        others = "; ".join(f"{_ranks(at)} is at {where}" for where, at in places.items() if where != mine)
        raise RuntimeError(f"layer {mine}: {others} (call {call})")


def _seconds() -> float:
    return float(os.environ.get("SYNCBN_DEBUG_TIMEOUT", "10"))


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
