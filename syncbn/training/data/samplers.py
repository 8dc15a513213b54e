"""Distributed samplers: decide which samples are in which batch on which rank."""

from collections.abc import Iterator, Sequence, Sized
from hashlib import blake2b
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
        indices: indices of its samples; may be empty.
        epoch: with a sample's index, it determines the random draws of the sample.
        like: index of the global batch's first sample: an empty batch takes its shapes from it, and it seeds what is
            drawn for the global batch.
        whole: whether the global batch is full; the last one of ``remainder="uneven"`` may be smaller.
        repeats: for each index, how often the sample was in the epoch before; empty if every sample is there once.
    """

    indices: list[int]
    epoch: int = 0
    like: int = 0
    whole: bool = True
    repeats: Sequence[int] = ()


class GlobalBatchSampler(DistributedSampler[Any]):
    """Splits the order of an epoch into global batches and distributes each of them over the ranks, round-robin.

    The order is that of DistributedSampler. Global batch k has the same samples on any number of ranks, so a position
    in the epoch, counted in global batches, is valid on any number of ranks. The class derives from DistributedSampler
    so that Lightning does not replace it. It yields one :class:`Request` per batch, so the DataLoader must not batch
    (``batch_size=None``).

    Args:
        dataset: map-style data set.
        batch_size: samples per rank.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: whether each epoch has a new order.
        seed: seed of the order.
        remainder: treatment of the samples after the last full global batch. "drop": they are left out of this epoch.
            "pad": the epoch's first samples fill the batch up. "uneven": they form a smaller batch, in which the ranks'
            shares differ by at most one sample and may be empty.
        shards: lists of sample indices, one per shard. Position p of a global batch then holds a sample of shard p
            modulo the number of shards. With as many shards as ranks, each rank has its own shard. Each shard has its
            own order. "drop" shortens all shards to the smallest, "pad" repeats samples of the smaller shards.
        balance: the class of each sample. An epoch then has as many samples as before, equally many of each of the K
            classes: positions 0 to K-1 have one of each, and so has each further run of K. If K does not divide the
            epoch, the classes of its last, shorter run take turns. Each class has a sequence of passes over its
            samples, which an epoch continues where the one before it ended: no sample is drawn again before all others
            of its class were. So a small class is repeated within an epoch, and a large one takes several epochs.

    Attributes:
        start: number of global batches that the next iteration skips.
        consumed: number of global batches of this epoch that the consumer got.
        lightning_epoch: the epoch of the last ``set_epoch``. ``epoch``, whose order is in use, is ahead of it if the
            data are iterated more than once in one Lightning epoch: next to a longer loader, in a dict of loaders.

    Raises:
        SettingError: unknown ``remainder``, or "uneven" with shards; both ``shards`` and ``balance``; an empty data set
            or shard; fewer samples than one
            global batch, with "drop"; a global batch that cannot hold equally many samples of each shard.
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
        balance: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed)
        check_remainder(remainder)
        self.remainder, self.global_batch = remainder, batch_size * num_replicas
        self.samples = len(cast(Sized, dataset))
        if balance is not None and shards is not None:
            raise SettingError(
                "data.balance", True, "shards have an order of their own; use balance=false or shards=null"
            )
        self.classes = None if balance is None else _by_class(balance)
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
        self.start, self.consumed = 0, 0
        self.lightning_epoch = 0
        self._positioned = False  # whether set_position was called and no batch was consumed since

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        cuts = range(self.start * self.global_batch, self.num_batches * self.global_batch, self.global_batch)
        size, mine = self.global_batch, slice(self.rank, None, self.num_replicas)
        repeats = _occurrences(order) if self.classes is not None else []
        # A list, not a generator: the iterator keeps this epoch's order even if set_epoch is called before it is used.
        return iter([self._request(order[cut : cut + size], repeats[cut : cut + size], mine) for cut in cuts])

    def _request(self, batch: list[int], repeats: list[int], mine: slice) -> Request:
        whole = len(batch) == self.global_batch
        return Request(batch[mine], self.epoch, batch[0], whole, repeats[mine])

    def __len__(self) -> int:
        """Number of global batches of a whole epoch."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, which starts at its first batch.

        Lightning also calls this for the epoch that :meth:`set_position` has set; the position is then kept.
        """
        if epoch != (self.lightning_epoch if self._positioned else self.epoch):
            self.set_position(epoch, 0)
        self.lightning_epoch = epoch

    def set_position(self, epoch: int, batch: int, lightning_epoch: int | None = None) -> None:
        """Let the next iteration start at global batch ``batch`` of an epoch.

        Args:
            epoch: the epoch whose order is used.
            batch: number of global batches to skip.
            lightning_epoch: Lightning's number of this epoch, if it is smaller; None if it is the same.
        """
        self.epoch, self.start, self.consumed = epoch, batch, batch
        self.lightning_epoch, self._positioned = epoch if lightning_epoch is None else lightning_epoch, True

    def mark_consumed(self, epoch: int, batches: int) -> None:
        """Record that the consumer got the first ``batches`` global batches; after the last, advance to the next epoch.

        Calls for another epoch than the current one are ignored.
        """
        if epoch == self.epoch:
            self.consumed, self._positioned = batches, False
            if batches == self.num_batches:
                self.epoch, self.start, self.consumed = epoch + 1, 0, 0

    def shares(self, batch: int) -> list[int]:
        """Number of samples of global batch ``batch`` on each rank."""
        size = self.global_batch
        if self.remainder == "uneven":
            size = min(size, self.samples - batch * size)
        return [len(range(rank, size, self.num_replicas)) for rank in range(self.num_replicas)]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        parts = [range(self.samples)] if self.shards is None else self.shards
        if self.classes is not None:
            return self._balanced_order(self.classes, generator)
        orders = [self._shuffled(part, generator) for part in parts]
        if self.remainder == "uneven":
            return orders[0]
        total = self.num_batches * self.global_batch // len(orders)
        orders = [(order * ceil(total / len(order)))[:total] for order in orders]
        return [index for one_of_each in zip(*orders, strict=True) for index in one_of_each]

    def _balanced_order(self, classes: list[list[int]], generator: torch.Generator) -> list[int]:
        """Rows of one sample of each class, in a new order in each row; the last row may lack classes."""
        total = self.samples if self.remainder == "uneven" else self.num_batches * self.global_batch
        number = len(classes)
        rows, rest = divmod(total, number)
        columns = []
        for label, members in enumerate(classes):
            # The last rows of all epochs, joined, have the classes in turn: 0, 1, ..., K-1, 0, 1, ...
            begin, end = (
                epoch * rows + ceil((epoch * rest - label) / number) for epoch in (self.epoch, self.epoch + 1)
            )
            columns.append(self._of_class(label, members, begin, end))
        order = [columns[label][row] for row in range(rows) for label in self._shuffled(range(number), generator)]
        last = [(self.epoch * rest + each) % number for each in range(rest)]
        return order + [columns[label][rows] for label in self._shuffled(last, generator)]

    def _of_class(self, label: int, members: list[int], begin: int, end: int) -> list[int]:
        """Samples ``begin`` to ``end`` of the sequence of passes over the members of a class."""
        first = begin // len(members)
        found = []
        for number in range(first, ceil(end / len(members))):
            seed = blake2b(repr((self.seed, label, number)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "little", signed=True))
            found += self._shuffled(members, generator)
        return found[begin - first * len(members) : end - first * len(members)]

    def _shuffled(self, part: Sequence[int], generator: torch.Generator) -> list[int]:
        if not self.shuffle:
            return list(part)
        return [part[i] for i in torch.randperm(len(part), generator=generator).tolist()]

    def _check_shards(self, shards: list[list[int]]) -> None:
        if self.remainder == "uneven":
            raise SettingError(
                "data.remainder", "uneven", "shards need batches of equal size; use data.remainder=drop or pad"
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
    """Assigns every sample to exactly one rank, with the same number of batches on each rank and no empty batch.

    torch's DistributedSampler repeats samples until all ranks have equally many (5 samples on 2 ranks become 6), and
    metrics count the repeated ones. Here the batches have unequal sizes instead; between ranks they differ by at most
    one sample. The number of batches must be the same on all ranks, because a forward pass through
    DistributedDataParallel may call collectives. The class derives from DistributedSampler so that Lightning does not
    replace it.

    It yields lists of indices, so the DataLoader must not batch (``batch_size=None``).

    Args:
        dataset: map-style data set.
        batch_size: maximum number of samples in a batch. With ``batch_size=1`` and samples that do not divide evenly,
            a batch has 2.
        num_replicas: number of ranks; None for that of the process group.
        rank: this rank; None for that of the process group.

    Attributes:
        shuffle_seed: seed of a random order that is the same in every iteration; None for the order of the data set, in
            which a batch holds neighbouring samples.

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


def _by_class(labels: Sequence[int]) -> list[list[int]]:
    """The indices of the samples of each class, without empty classes."""
    found: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        found.setdefault(int(label), []).append(index)
    return [found[label] for label in sorted(found)]


def _occurrences(order: list[int]) -> list[int]:
    """For each position, how often its sample was in the order before."""
    seen: dict[int, int] = {}
    counts = []
    for index in order:
        counts.append(seen.get(index, 0))
        seen[index] = counts[-1] + 1
    return counts


def check_remainder(remainder: str) -> None:
    """Raise a SettingError unless the value is in :data:`REMAINDERS`."""
    if remainder not in REMAINDERS:
        raise SettingError("data.remainder", remainder, f"use one of {', '.join(REMAINDERS)}")


def world_size() -> int:
    """Number of ranks in the process group; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0
