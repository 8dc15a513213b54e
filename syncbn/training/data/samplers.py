"""Which samples make up which batch on which rank."""

from collections.abc import Iterator, Sequence, Sized
from math import ceil
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, DistributedSampler

from syncbn.training.errors import SettingError

REMAINDERS = ("drop", "pad", "uneven")


class Request(NamedTuple):
    """One batch to fetch.

    Attributes:
        indices: of its samples; there may be none.
        epoch: from which, with the sample's index, follows the randomness of a sample.
        like: a sample that an empty batch takes its shapes from.
    """

    indices: list[int]
    epoch: int = 0
    like: int = 0


class GlobalBatchSampler(DistributedSampler[Any]):
    """Cuts the order of an epoch into global batches and deals each of them to the ranks, in turn.

    The order is DistributedSampler's. Global batch k is the same samples on any number of ranks, so a position in the
    epoch, counted in global batches, means the same there too. It is a DistributedSampler so that Lightning leaves it
    in place. Yields a :class:`Request` a batch, so the DataLoader must not batch (``batch_size=None``).

    Args:
        dataset: map-style.
        batch_size: per rank.
        num_replicas: ranks.
        rank: this one.
        shuffle: a new order in each epoch.
        seed: of the order.
        remainder: what becomes of the samples after the last full global batch. "drop": they wait for another epoch's
            order. "pad": the epoch's first samples fill the batch up. "uneven": they are a smaller batch, of which a
            rank gets one sample more or less than another, perhaps none.
        shards: indices of samples, a list for each shard. Then position p of a global batch holds a sample of shard
            p modulo their number: as many shards as ranks are a shard for each rank. Each shard has an order of its
            own. "drop" leaves out what the smallest shard lacks, "pad" goes round the smaller ones again.

    Attributes:
        start: global batches that the next iteration leaves out.
        reached: global batches of this epoch that were handed out.
        told: the epoch that ``set_epoch`` has said. ``epoch``, whose order is in use, is ahead of it where the data are
            gone through more than once in it: beside a longer loader, in a dict of loaders.

    Raises:
        SettingError: another word for ``remainder``, or "uneven" with shards; a data set, or a shard, without a single
            batch; a global batch that does not hold equally many samples of each shard.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        num_replicas: int,
        rank: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        remainder: str = "drop",
        shards: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed)
        check_remainder(remainder)
        self.remainder, self.samples, self.global_batch = (
            remainder,
            len(cast(Sized, dataset)),
            batch_size * num_replicas,
        )
        self.shards = None if shards is None else [list(shard) for shard in shards]
        if self.shards is not None:
            self._check_shards(self.shards)
            lengths = [len(shard) for shard in self.shards]
            self.samples = len(lengths) * (min(lengths) if remainder == "drop" else max(lengths))
        if remainder == "drop" and self.samples < self.global_batch:
            raise SettingError(
                "data.batch_size",
                batch_size,
                f"a global batch is {self.global_batch} samples ({batch_size} on each of {num_replicas} devices), but "
                f"the training set has {self.samples}; use at most {self.samples // num_replicas}",
            )
        if self.samples == 0:
            raise SettingError("data", hint="the training set is empty; give it at least one sample")
        whole = self.samples / self.global_batch
        self.num_batches = int(whole) if remainder == "drop" else ceil(whole)
        self.start, self.reached = 0, 0
        self.told, self._waits = 0, False

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        cuts = range(self.start * self.global_batch, self.num_batches * self.global_batch, self.global_batch)
        batches = [order[cut : cut + self.global_batch] for cut in cuts]
        mine = slice(self.rank, None, self.num_replicas)
        # A list, made here and now: whoever iterates gets this epoch, whatever is set later.
        return iter([Request(batch[mine], self.epoch, batch[0]) for batch in batches])

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch: from its begin, but for the one that is under way already."""
        if epoch != (self.told if self._waits else self.epoch):
            self.go_to(epoch, 0)
        self.told = epoch

    def go_to(self, epoch: int, batch: int, told: int | None = None) -> None:
        """The next iteration begins in the middle of an epoch, which Lightning may call by an earlier number."""
        self.epoch, self.start, self.reached = epoch, batch, batch
        self.told, self._waits = epoch if told is None else told, True

    def handed_out(self, epoch: int, batches: int) -> None:
        """So many global batches of this epoch are; after the last the next epoch's turn has come."""
        if epoch == self.epoch:
            self.reached, self._waits = batches, False
            if batches == self.num_batches:
                self.epoch, self.start, self.reached = epoch + 1, 0, 0

    def shares(self, batch: int) -> list[int]:
        """How many samples of this global batch each rank gets."""
        size = self.global_batch
        if self.remainder == "uneven":
            size = min(size, self.samples - batch * size)
        return [len(range(rank, size, self.num_replicas)) for rank in range(self.num_replicas)]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        parts = [range(self.samples)] if self.shards is None else self.shards
        orders = [self._shuffled(part, generator) for part in parts]
        if self.remainder == "uneven":
            return orders[0]
        total = self.num_batches * self.global_batch // len(orders)
        orders = [(order * ceil(total / len(order)))[:total] for order in orders]
        return [index for one_of_each in zip(*orders, strict=True) for index in one_of_each]

    def _shuffled(self, part: Sequence[int], generator: torch.Generator) -> list[int]:
        if not self.shuffle:
            return list(part)
        return [part[i] for i in torch.randperm(len(part), generator=generator).tolist()]

    def _check_shards(self, shards: list[list[int]]) -> None:
        if self.remainder == "uneven":
            raise SettingError(
                "data.remainder", "uneven", "shards are dealt in equal parts; use data.remainder=drop or pad"
            )
        if self.global_batch % len(shards):
            raise SettingError(
                "data.num_shards",
                len(shards),
                f"a global batch of {self.global_batch} samples cannot hold equally many of each; use a global batch "
                f"that is a multiple of {len(shards)}",
            )
        if not all(shards):
            raise SettingError("data.num_shards", len(shards), "a shard has no training image; use fewer")


class ExactSampler(DistributedSampler[Any]):
    """Deals every sample to exactly one rank and gives each rank equally many batches, none of them empty.

    The usual sampler repeats samples until all ranks have as many (5 samples on 2 ranks are counted as 6), and a metric
    counts the repeated ones. Here the batches are of unequal size instead, by one sample at most between ranks. Equally
    many they must be, as a forward pass through DistributedDataParallel is a message. It is a
    DistributedSampler so that Lightning leaves it in place.

    Yields lists of indices, so the DataLoader must not batch (``batch_size=None``).

    Args:
        dataset: map-style.
        batch_size: the most samples in a batch; but where it is 1 and the samples do not divide evenly, a batch has 2.
        num_replicas: ranks; of the process group if None.
        rank: this one; of the process group if None.

    Attributes:
        shuffle_seed: of a random order in which samples are dealt, the same each time; None: the data set's own order,
            so that a batch is from one piece of it.

    Raises:
        SettingError: fewer samples than ranks.
    """

    shuffle_seed: int | None = None

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        ranks = world_size() if num_replicas is None else num_replicas
        super().__init__(dataset, ranks, this_rank() if rank is None else rank, shuffle=False)
        samples = len(cast(Sized, dataset))
        if samples < ranks:
            raise SettingError(
                "trainer.devices",
                hint=f"the evaluation data have fewer samples ({samples}) than there are ranks ({ranks}); use at most "
                f"{samples}",
            )
        # As many batches as the largest share needs, but no more than the smallest share can fill.
        self.num_batches = min(ceil(ceil(samples / ranks) / batch_size), samples // ranks)

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(len(cast(Sized, self.dataset)))
        if self.shuffle_seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.shuffle_seed))
        share = order[self.rank :: self.num_replicas]
        return iter([batch.tolist() for batch in share.tensor_split(self.num_batches)])

    def __len__(self) -> int:
        return self.num_batches


def check_remainder(remainder: str) -> None:
    """Refuses what is none of the words.

    Raises:
        SettingError: it is none.
    """
    if remainder not in REMAINDERS:
        raise SettingError("data.remainder", remainder, f"use one of {', '.join(REMAINDERS)}")


def world_size() -> int:
    """Ranks of the process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """This one of them; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0
