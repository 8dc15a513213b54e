"""Loaders: randomness that belongs to the sample, an unreadable sample named, and a position to go on from."""

import copy
import random
import traceback
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import count
from os import PathLike, fspath
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from syncbn.nn import rng
from syncbn.nn.torch_internals import tree_map
from syncbn.training.data import samplers
from syncbn.training.data.samplers import ExactSampler, GlobalBatchSampler, Request
from syncbn.training.data.samplers import this_rank as _rank
from syncbn.training.data.samplers import world_size as _world_size
from syncbn.training.errors import AgreedError, SettingError

FILES = ("samples", "imgs", "paths", "files", "filenames")  # where data sets keep the list of their files


class SampleError(RuntimeError):
    """A sample that cannot be read. The message names it, in one line; its cause is what the data set raised."""


class BatchLoader(DataLoader[Any]):
    """A DataLoader over :class:`Batches`, in whose workers a sample that cannot be read stays one line.

    Nothing happens at ``iter()``: workers start, and a sampler is asked, with the first batch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own class
        for batch in super().__iter__():
            if isinstance(batch, _Unreadable):
                raise SampleError(batch.line) from _InWorker(batch.traceback)
            yield batch


class TrainLoader(BatchLoader):
    """A loader that knows its place in the epoch, so that training goes on from there; for a GlobalBatchSampler.

    The place is that of the batches which the consumer got, however many the workers have made ready. An iteration
    takes its epoch and its start when its first batch is asked for: Lightning calls ``iter()`` before it tells the
    sampler which epoch it is.

    Attributes:
        global_samples: samples of the latest batch, over all ranks; None before the first.
    """

    sampler: GlobalBatchSampler
    global_samples: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        epoch, start = sampler.epoch, sampler.start
        for number, batch in enumerate(super().__iter__(), start):
            sampler.start = 0  # this iteration has it by now; the next one begins at the begin
            sampler.handed_out(epoch, number + 1)
            self.global_samples = sum(sampler.shares(number))
            yield batch

    def state_dict(self) -> dict[str, int]:
        """``epoch``, whose order is in use, and ``batch``, how many of its global batches the consumer got.

        After the last batch it is the next epoch and 0. Where ``set_epoch`` has not said that epoch, ``during`` is the
        one that it has said. The numbers are the same on all ranks, and hold on any number of ranks with the same
        global batch.
        """
        sampler = self.sampler
        state = {"epoch": sampler.epoch, "batch": sampler.reached}
        return state if sampler.told == sampler.epoch else state | {"during": sampler.told}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on from there; the one after it begins at the begin of an epoch.

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
        self.sampler.go_to(epoch, batch, state.get("during"))


class Batches(Dataset[Any]):
    """Whole batches of a data set, by requests or lists of indices.

    While sample ``i`` is fetched, torch's CPU generator, ``random`` and numpy's global generator are at the state that
    ``(seed, epoch, i)`` gives: 512 bits of its BLAKE2b hash, of which torch takes 64, ``random`` 64 and numpy 128. So
    what is drawn for a sample (an augmentation) is new in each epoch, and does not depend on workers, ranks, batches
    or a resumption. What ``collate`` draws likewise follows from the batch's first sample. Afterwards the generators
    are put back, except in a worker, where nobody else uses them. A plain TensorDataset and ``default_collate`` draw
    nothing, and the two together are left unseeded.

    Args:
        dataset: map-style.
        collate: makes a batch of a list of samples.
        seed: of the samples' randomness.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int = 0) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.draws = type(_origin(dataset)) is not TensorDataset or collate is not default_collate

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, request: Request | list[int]) -> Any:
        if not isinstance(request, Request):
            request = Request(request)
        if not self.draws:
            return self._fetch(request)
        with _generators_put_back():
            return self._fetch(request)

    def _fetch(self, request: Request) -> Any:
        indices = request.indices or [request.like]
        samples = []
        for index in indices:
            self._seed(request.epoch, index)
            try:
                samples.append(self.dataset[index])
            except Exception as error:
                line = _unreadable(self.dataset, index, error)
                if get_worker_info() is None:
                    raise SampleError(line) from error
                # A value: an exception would come out of a worker with its traceback for a message.
                return _Unreadable(line, "".join(traceback.format_exception(error)))
        self._seed(request.epoch, indices[0], "collate")
        batch = self.collate(samples)
        return batch if request.indices else tree_map(_emptied, batch)

    def _seed(self, *numbers: object) -> None:
        if not self.draws:
            return
        words = blake2b(repr((self.seed, *numbers)).encode()).digest()
        # Not torch.manual_seed, which has GPUs seeded too.
        torch.default_generator.manual_seed(int.from_bytes(words[:8], "little", signed=True))
        random.seed(words[8:16])
        np.random.seed(np.frombuffer(words[16:32], "<u4"))


@dataclass
class _Unreadable:
    """A worker's word on a sample that it could not read."""

    line: str
    traceback: str


class _InWorker(Exception):  # noqa: N818  # no error of its own, but another's traceback
    """What the data set raised in a worker, as text: exceptions need not pickle, and tracebacks do not."""

    def __str__(self) -> str:
        return f"in a worker\n{self.args[0]}"


@contextmanager
def _generators_put_back() -> Iterator[None]:
    if get_worker_info() is not None:
        yield
        return
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _emptied(leaf: Any) -> Any:
    return leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _origin(dataset: Dataset[Any]) -> Dataset[Any]:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _unreadable(dataset: Dataset[Any], index: int, error: Exception) -> str:
    while isinstance(dataset, Subset):
        index = int(dataset.indices[index])
        dataset = dataset.dataset
    file = _file(dataset, index)
    where = f"sample {index} of {type(dataset).__name__}" + (f" ({file})" if file else "")
    return f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())}; repair or remove it"


def _file(dataset: Dataset[Any], index: int) -> str | None:
    """The sample's file, where the data set lists paths, or tuples that begin with one, as torchvision's do."""
    for name in FILES:
        entries = getattr(dataset, name, None)
        if isinstance(entries, list | tuple | np.ndarray) and index < len(entries):
            entry = entries[index]
            path = entry[0] if isinstance(entry, list | tuple) and entry else entry
            if isinstance(path, str | PathLike):
                return str(fspath(path))
    return None


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    remainder: str = "drop",
    shards: Sequence[Sequence[int]] | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    **options: Any,
) -> TrainLoader:
    """Batches in a new order each epoch; a global batch holds the same samples on any number of ranks.

    What is drawn while a sample is fetched follows from ``seed``, epoch and sample alone (see
    :class:`~syncbn.training.data.loaders.Batches`). The loader has ``state_dict`` and ``load_state_dict``, by which
    Lightning goes on in the middle of an epoch. ``iter()`` draws nothing from torch's global generator.

    Args:
        dataset: map-style.
        batch_size: per rank.
        shuffle: a new order in each epoch.
        seed: of the order, and of what samples draw.
        remainder: what becomes of the n samples after the last full global batch. "drop": they wait for another epoch's
            order. "pad": the epoch's first samples fill the batch up. "uneven": a smaller batch, dealt over the W
            ranks as evenly as possible; a rank may get none, in tensors of shape (0, ...). A LightningModule of your
            own then weights its loss by ``W / n`` times the sum over its samples, n being the loader's
            ``global_samples``; ours does.
        shards: indices of samples, a list for each shard; where their number divides that of the ranks, rank r gets
            samples of shard r modulo it alone (see :class:`~syncbn.training.data.samplers.GlobalBatchSampler`).
        collate_fn: makes a batch of a list of samples.
        options: further arguments of DataLoader.

    Raises:
        SettingError: fewer samples than one global batch, with "drop"; another word for ``remainder``.
        SampleError: from the iteration, where ``dataset[i]`` raises; it names the sample.
    """
    sampler = GlobalBatchSampler(
        dataset, batch_size, _world_size(), _rank(), shuffle=shuffle, seed=seed, remainder=remainder, shards=shards
    )
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return TrainLoader(Batches(dataset, collate_fn, seed), batch_size=None, sampler=sampler, **options)


def exact_loader(
    dataset: Dataset[Any], batch_size: int, *, collate_fn: Callable[[list[Any]], Any] = default_collate, **options: Any
) -> BatchLoader:
    """Every sample once, on exactly one rank, in equally many batches on each: for validation and test.

    What a sample draws is the same every time. ``iter()`` draws nothing from torch's global generator.

    Args:
        dataset: map-style.
        batch_size: per rank, at most (see :class:`ExactSampler`).
        collate_fn: makes a batch of a list of samples.
        options: further arguments of DataLoader.

    Raises:
        SettingError: fewer samples than ranks.
        SampleError: from the iteration, where ``dataset[i]`` raises; it names the sample.
    """
    sampler = ExactSampler(dataset, batch_size)
    options.setdefault("generator", torch.Generator())
    return BatchLoader(Batches(dataset, collate_fn), batch_size=None, sampler=sampler, **options)


def training_batches(trainer: Any) -> Iterator[Any]:
    """Batches of the training data without end, epoch after epoch: from the one that is trained, in a test from the
    first, so that the result does not depend on which run tests a checkpoint. The same on each call.
    """
    loader = own_loader(training_loader(trainer))
    for epoch in count(trainer.current_epoch if trainer.state.fn == TrainerFn.FITTING else 0):
        loader.sampler.go_to(epoch, 0)
        yield from loader


def training_loader(trainer: Any) -> Any:
    """The loader of the training data, also in a test."""
    loader = trainer.train_dataloader
    if loader is not None or trainer.datamodule is None:
        return loader
    with rng.untouched():
        reset_seed()  # as DDPStrategy does before setup("fit"): a split that is drawn there is the same
        trainer.datamodule.setup("fit")
        return trainer.datamodule.train_dataloader()


_OF_STATISTICS = partial(AgreedError, "PreciseStatistics")


def own_loader(
    loader: Any,
    refusal: Callable[..., AgreedError] = _OF_STATISTICS,
    instead: str = "give it batches=, a function that returns batches",
) -> TrainLoader:
    """A loader over the same data as this one, which it leaves alone.

    Args:
        loader: of training data.
        refusal: makes the error from its hint.
        instead: what works where there can be none, likewise.

    Raises:
        SettingError: it is no DataLoader over a map-style data set, or it picks samples in a way of its own.
    """
    options: dict[str, Any] = {
        name: getattr(loader, name, None) for name in ("worker_init_fn", "multiprocessing_context")
    }
    options |= {"num_workers": getattr(loader, "num_workers", 0), "pin_memory": getattr(loader, "pin_memory", False)}
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
        enough = len(cast(Sized, loader.dataset)) >= loader.batch_size * samplers.world_size()
        options |= {"remainder": "drop" if enough else "pad", "collate_fn": loader.collate_fn}
        return train_loader(loader.dataset, loader.batch_size, **options)
    raise refusal(hint=f"no second loader can be made of the training data ({type(loader).__name__}); {instead}")


def global_samples(trainer: pl.Trainer | None) -> int | None:
    """Samples of the training batch in hand, over all ranks; None where the loader is not one of ours."""
    loader = None if trainer is None else trainer.train_dataloader
    return loader.global_samples if isinstance(loader, TrainLoader) else None
