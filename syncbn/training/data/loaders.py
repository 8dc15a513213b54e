"""Data loaders with a position for the resume, which evaluate each sample once on any number of ranks."""

import copy
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from itertools import count
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from syncbn.nn import rng
from syncbn.training.data.batches import Batches, SampleError, Unreadable, WorkerTraceback
from syncbn.training.data.samplers import ExactSampler, GlobalBatchSampler, this_rank, world_size
from syncbn.training.errors import AgreedError, SettingError


class BatchLoader(DataLoader[Any]):
    """A DataLoader over :class:`Batches` that raises a one-line SampleError, also for a sample read in a worker.

    ``iter()`` has no effect by itself: workers start, and the sampler is iterated, when the first batch is requested.
    """

    # A generator function, so that the body runs at the first next(), not at iter().
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own class
        for batch in super().__iter__():
            if isinstance(batch, Unreadable):
                raise SampleError(batch.line) from WorkerTraceback(batch.traceback)
            yield batch


class TrainLoader(BatchLoader):
    """A loader with a position in the epoch, for resuming mid-epoch; it needs a GlobalBatchSampler.

    The position counts the batches that the consumer got, not those that workers have prefetched. An iteration reads
    its epoch and start when its first batch is requested, because Lightning calls ``iter()`` before ``set_epoch``.

    Attributes:
        global_samples: number of samples of the latest batch, over all ranks; None before the first batch.
    """

    sampler: GlobalBatchSampler
    global_samples: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        epoch, start = sampler.epoch, sampler.start
        for number, batch in enumerate(super().__iter__(), start):
            sampler.start = 0  # this iteration has read it; the next one starts at the first batch
            sampler.mark_consumed(epoch, number + 1)
            self.global_samples = sum(sampler.shares(number))
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return ``epoch``, whose order is in use, and ``batch``, the number of its global batches consumed so far.

        After the last batch this is the next epoch and 0. If Lightning's epoch is another one, it is ``during``. The
        numbers are the same on all ranks, and valid on any number of ranks with the same global batch.
        """
        sampler = self.sampler
        state = {"epoch": sampler.epoch, "batch": sampler.consumed}
        return state if sampler.lightning_epoch == sampler.epoch else state | {"during": sampler.lightning_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position in ``state`` in the next iteration; the one after it starts an epoch.

        Raises:
            SettingError: an epoch does not have that many global batches.
        """
        epoch, batch = state["epoch"], state["batch"]
        if not 0 <= batch < len(self):
            raise SettingError(
                "data.batch_size",
                hint=f"the checkpoint is at batch {batch} of an epoch, but an epoch has {len(self)} of "
                f"{self.sampler.global_batch} samples; use the global batch, data and data.remainder of that run",
            )
        self.sampler.set_position(epoch, batch, state.get("during"))


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    remainder: str = "drop",
    shards: Sequence[Sequence[int]] | None = None,
    balance: Sequence[int] | None = None,
    mix: Any = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    **options: Any,
) -> TrainLoader:
    """Make a training loader; a global batch has the same samples on any number of ranks.

    Random draws for a sample depend on ``seed``, the epoch and the sample only (see
    :class:`~syncbn.training.data.loaders.Batches`). The loader has ``state_dict`` and ``load_state_dict``, with which
    Lightning resumes mid-epoch. ``iter()`` draws nothing from torch's global generator.

    Args:
        dataset: map-style data set.
        batch_size: samples per rank.
        shuffle: whether each epoch has a new order.
        seed: seed of the order, and of the samples' random draws.
        remainder: treatment of the n samples after the last full global batch. "drop": they are left out of this epoch.
            "pad": the epoch's first samples fill the batch up. "uneven": they form a smaller batch, split over the W
            ranks as evenly as possible; a rank may get none, in tensors of shape (0, ...). A custom LightningModule
            then has to return ``W / n`` times the sum of its samples' losses, where n is the loader's
            ``global_samples``; the built-in Classifier does so.
        shards: lists of sample indices, one per shard. If their number divides the number of ranks, rank r gets samples
            of one shard only, r modulo that number (see :class:`~syncbn.training.data.samplers.GlobalBatchSampler`).
        balance: the class of each sample, to draw equally many of each class in every epoch; None for each sample once.
        mix: mixes the samples of a batch (see :class:`~syncbn.training.data.transforms.mixing.Mix`); None for none.
        collate_fn: makes a batch from a list of samples.
        options: further arguments of DataLoader.

    Raises:
        SettingError: fewer samples than one global batch, with "drop"; unknown ``remainder``.
        SampleError: during iteration, if ``dataset[i]`` raises; it names the sample.
    """
    sampler = GlobalBatchSampler(
        dataset,
        batch_size,
        world_size(),
        this_rank(),
        shuffle=shuffle,
        seed=seed,
        remainder=remainder,
        shards=shards,
        balance=balance,
    )
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return TrainLoader(Batches(dataset, collate_fn, seed, mix), batch_size=None, sampler=sampler, **options)


def loader_options(
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> dict[str, Any]:
    """Return the arguments of DataLoader for these settings of ``data``.

    Args:
        num_workers: loader processes per device; 0 loads in the training process.
        prefetch_factor: batches that each of them loads ahead; None is torch's 2.
        pin_memory: whether batches are in page-locked memory, which a GPU copies faster; None: if there is a GPU.
        persistent_workers: whether the processes stay between epochs; None: if there are any.

    Raises:
        SettingError: ``prefetch_factor`` or ``persistent_workers`` without workers; a value out of its range.
    """
    for name, value, least in (("num_workers", num_workers, 0), ("prefetch_factor", prefetch_factor, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SettingError(f"data.{name}", value, f"use a whole number, {least} or more")
    if not num_workers:
        for name, asked in (("prefetch_factor", prefetch_factor), ("persistent_workers", persistent_workers)):
            if asked:
                hint = "data.num_workers=0 loads in the training process; use data.num_workers=1 or more"
                raise SettingError(f"data.{name}", asked, hint)
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin}
    if num_workers:
        options["persistent_workers"] = True if persistent_workers is None else persistent_workers
    return options | ({} if prefetch_factor is None else {"prefetch_factor": prefetch_factor})


def exact_loader(
    dataset: Dataset[Any], batch_size: int, *, collate_fn: Callable[[list[Any]], Any] = default_collate, **options: Any
) -> BatchLoader:
    """Make a loader for validation or test: every sample once, on exactly one rank, with equally many batches on each.

    Random draws for a sample are the same in every iteration. ``iter()`` draws nothing from torch's global generator.

    Args:
        dataset: map-style data set.
        batch_size: maximum number of samples per rank (see :class:`ExactSampler`).
        collate_fn: makes a batch from a list of samples.
        options: further arguments of DataLoader.

    Raises:
        SettingError: fewer samples than ranks.
        SampleError: during iteration, if ``dataset[i]`` raises; it names the sample.
    """
    sampler = ExactSampler(dataset, batch_size)
    options.setdefault("generator", torch.Generator())
    return BatchLoader(Batches(dataset, collate_fn), batch_size=None, sampler=sampler, **options)


def training_batches(trainer: Any) -> Iterator[Any]:
    """Yield batches of the training data without end, the same on each call.

    While fitting, they begin with the current epoch. In a test they begin with epoch 0, so that the result does not
    depend on the run that tests a checkpoint.
    """
    loader = second_loader(training_loader(trainer))
    for epoch in count(trainer.current_epoch if trainer.state.fn == TrainerFn.FITTING else 0):
        loader.sampler.set_position(epoch, 0)
        yield from loader


def training_loader(trainer: Any) -> Any:
    """Return the loader of the training data, also in a test; None if there is none."""
    loader = trainer.train_dataloader
    if loader is not None or trainer.datamodule is None:
        return loader
    with rng.untouched():
        # DDPStrategy resets the seed before setup("fit"). With the same seed, a split that is drawn there is the same.
        reset_seed()
        trainer.datamodule.setup("fit")
        return trainer.datamodule.train_dataloader()


_STATISTICS_ERROR = partial(AgreedError, "PreciseStatistics")


def second_loader(
    loader: Any,
    make_error: Callable[..., AgreedError] = _STATISTICS_ERROR,
    fix: str = "give it batches=, a function that returns batches",
) -> TrainLoader:
    """Make an independent loader over the same data; the position of the given loader is not changed.

    If it is no DataLoader over a map-style data set, or has a custom sampler, this raises ``make_error(hint=...)``,
    where the hint ends with ``fix``.
    """
    defaults = {"worker_init_fn": None, "multiprocessing_context": None, "num_workers": 0, "pin_memory": False}
    options: dict[str, Any] = {name: getattr(loader, name, default) for name, default in defaults.items()}
    if isinstance(loader, TrainLoader):
        generator = torch.Generator().manual_seed(loader.sampler.seed)
        sampler = copy.copy(loader.sampler)
        return TrainLoader(loader.dataset, batch_size=None, sampler=sampler, generator=generator, **options)
    known = (DistributedSampler, RandomSampler, SequentialSampler)
    if (
        isinstance(loader, DataLoader)
        and hasattr(loader.dataset, "__getitem__")
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in known
    ):
        assert loader.batch_size is not None
        enough = len(cast(Sized, loader.dataset)) >= loader.batch_size * world_size()
        options |= {"remainder": "drop" if enough else "pad", "collate_fn": loader.collate_fn}
        return train_loader(loader.dataset, loader.batch_size, **options)
    raise make_error(hint=f"no second loader can be made of the training data ({type(loader).__name__}); {fix}")


def global_samples(trainer: pl.Trainer | None) -> int | None:
    """Number of samples of the current training batch over all ranks; None if the loader is not a TrainLoader."""
    loader = None if trainer is None else trainer.train_dataloader
    return loader.global_samples if isinstance(loader, TrainLoader) else None
