"""Gathers the rows of all ranks, for losses that compare the samples of all devices."""

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn.comm import all_reduce


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate the rows of all ranks, without gradients. Two all-gathers: the numbers of rows, and the rows.

    Args:
        x: shape ``(N, *)``; N may differ between ranks, and be 0.

    Returns:
        The rows of rank 0, then those of rank 1, and so forth, the same bits on each rank; and where this rank's rows
        begin. In one process these are the rows of ``x`` and 0.
    """
    x = x.detach()
    if not dist.is_initialized() or dist.get_world_size() == 1 or all_reduce.is_alone():
        return x, 0
    ranks = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = torch.cat(counts).tolist()
    padded = x.new_zeros(max(sizes), *x.shape[1:])  # an all-gather needs equal shapes
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return rows, sum(sizes[: dist.get_rank()])


def with_rows_of_all(x: Tensor) -> Tensor:
    """The rows of all ranks as in :func:`gather_rows`; this rank's rows have their gradient, the others are constants.

    So the gradient of a function of all rows is exact with respect to this rank's rows, and backward sends nothing.
    Where each rank computes the same function L, the gradient of its weights is the sum of these parts over the ranks.
    DistributedDataParallel averages them, so backward has to begin at ``L * world_size``.
    """
    rows, begin = gather_rows(x)
    return torch.cat([rows[:begin], x, rows[begin + len(x) :]])
