"""Gathers the rows of all ranks, for losses that compare the samples of all devices."""

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn.comm import all_reduce


def gather_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, without gradients. Two all-gathers: of the numbers of rows, and of the rows.

    The order is the first row of each rank, then the second of each, and so on. One process that has all samples, as
    with ``simulate``, has them in this order.

    Args:
        x: shape ``(N, *)``; N may differ between ranks, and be 0.

    Returns:
        The rows, the same bits on each rank, and the places of this rank's rows among them, shape ``(N,)``. In one
        process these are the rows of ``x`` and all places.
    """
    x = x.detach()
    if not dist.is_initialized() or dist.get_world_size() == 1 or all_reduce.is_alone():
        return x, torch.arange(len(x), device=x.device)
    ranks = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = torch.cat(counts).tolist()
    padded = x.new_zeros(max(sizes), *x.shape[1:])  # an all-gather needs equal shapes
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    holders = [(row, rank) for row in range(max(sizes)) for rank in range(ranks) if row < sizes[rank]]
    own = [place for place, (_, rank) in enumerate(holders) if rank == dist.get_rank()]
    order = torch.tensor([rank * len(padded) + row for row, rank in holders], dtype=torch.long, device=x.device)
    return torch.cat(parts)[order], torch.tensor(own, dtype=torch.long, device=x.device)


def with_rows_of_all(x: Tensor) -> Tensor:
    """The rows of all ranks as in :func:`gather_rows`; this rank's rows have their gradient, the others are constants.

    So the gradient of a function of all rows is exact with respect to this rank's rows, and backward sends nothing.
    Where each rank computes the same function L, the gradient of its weights is the sum of these parts over the ranks.
    DistributedDataParallel averages them, so backward has to begin at ``L * world_size``.
    """
    rows, own = gather_rows(x)
    return rows.index_copy(0, own, x)
