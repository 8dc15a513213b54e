"""The one message: an all-reduce by sum, as a functional collective, so that ``torch.compile`` can trace it."""

import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from syncbn.nn import groups

_forced = False  # see syncbn.testing.force_exchange


def partners(spec: groups.GroupSpec) -> dist.ProcessGroup | None:
    """The process group to exchange with, or None where there is nobody to exchange with."""
    group = groups.resolve(spec)
    if group is None or (group.size() == 1 and not _forced):
        return None
    return group


def all_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``x`` over the ranks of ``group``, bitwise the same on each; the stream waits, the host does not."""
    total: Tensor = funcol.wait_tensor(funcol.all_reduce(x, "sum", group))
    return total
