"""Makes whole batches of a data set, with random draws per sample, and names a sample that cannot be read."""

import random
import traceback
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from os import PathLike, fspath
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate, get_worker_info

from syncbn.nn.torch_internals import tree_map
from syncbn.training.data.samplers import Request

FILES = ("samples", "imgs", "paths", "files", "filenames")  # attributes in which data sets keep the list of their files


class SampleError(RuntimeError):
    """A sample cannot be read. The message names it in one line; ``__cause__`` is the exception of the data set."""


class Batches(Dataset[Any]):
    """A data set whose items are whole batches, indexed by requests or lists of indices.

    Before sample ``i`` is fetched, torch's CPU generator, ``random`` and numpy's global generator are seeded with the
    BLAKE2b hash (512 bits) of ``(seed, epoch, i)``; torch and ``random`` get 64 bits each, numpy gets 128. Random draws
    for a sample (an augmentation) therefore differ between epochs, and do not depend on workers, ranks, batches or a
    resume. The draws of ``collate`` are seeded in the same way by the batch's first sample. Afterwards the generators
    are restored, except in a worker, where nothing else uses them. A plain TensorDataset with ``default_collate`` draws
    nothing, so for it nothing is seeded.

    Args:
        dataset: map-style data set.
        collate: makes a batch from a list of samples.
        seed: seed of the samples' random draws.
        mix: called with a batch and its epoch, returns the mixed batch (see :class:`.transforms.mixing.Mix`); its draws
            are seeded by the first sample of the global batch, and are the same on all ranks. A smaller last batch
            (``remainder="uneven"``) is not mixed.
    """

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int = 0, mix: Any = None
    ) -> None:
        self.dataset, self.collate, self.seed, self.mix = dataset, collate, seed, mix
        plain = type(_without_subset(dataset)) is TensorDataset and collate is default_collate
        self.draws = mix is not None or not plain

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, request: Request | list[int]) -> Any:
        with _generators_restored() if self.draws else nullcontext():
            return self._fetch(request if isinstance(request, Request) else Request(request))

    def _fetch(self, request: Request) -> Any:
        indices = request.indices or [request.like]
        samples = []
        for place, index in enumerate(indices):
            repeat = request.repeats[place] if place < len(request.repeats) else 0
            self._seed(request.epoch, index, *([repeat] if repeat else []))
            try:
                samples.append(self.dataset[index])
            except Exception as error:
                line = _unreadable(self.dataset, index, error)
                if get_worker_info() is None:
                    raise SampleError(line) from error
                # A value, not an exception: torch re-raises an exception of a worker with the whole traceback as its
                # message (torch._utils.ExceptionWrapper), which would not be one line.
                return Unreadable(line, "".join(traceback.format_exception(error)))
        self._seed(request.epoch, indices[0], "collate")
        batch = self.collate(samples)
        if self.mix is not None and request.whole:
            self._seed(request.epoch, request.like, "mix")
            batch = self.mix(batch, request.epoch)
        return batch if request.indices else tree_map(_without_samples, batch)

    def _seed(self, *numbers: object) -> None:
        if not self.draws:
            return
        words = blake2b(repr((self.seed, *numbers)).encode()).digest()
        # torch.manual_seed would seed the generators of the GPUs too.
        torch.default_generator.manual_seed(int.from_bytes(words[:8], "little", signed=True))
        random.seed(words[8:16])
        np.random.seed(np.frombuffer(words[16:32], "<u4"))


class Unreadable(NamedTuple):
    """Returned by a worker in place of a batch with a sample that it could not read."""

    line: str
    traceback: str


class WorkerTraceback(Exception):  # noqa: N818  # never raised, only shown as the cause of a SampleError
    """The data set's exception in a worker, as text: exceptions may not pickle, and tracebacks never do."""

    def __str__(self) -> str:
        return f"in a worker\n{self.args[0]}"


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Restore the global random generators at the end; does nothing in a worker."""
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


def _without_samples(leaf: Any) -> Any:
    """A tensor of shape ``(0, *)``; anything else is returned as it is."""
    return leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _without_subset(dataset: Dataset[Any]) -> Dataset[Any]:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _unreadable(dataset: Dataset[Any], index: int, error: Exception) -> str:
    """The message of a SampleError: the sample by its index in the innermost data set, its file, and the error."""
    while isinstance(dataset, Subset):
        index = int(dataset.indices[index])
        dataset = dataset.dataset
    file = _file(dataset, index)
    where = f"sample {index} of {type(dataset).__name__}" + (f" ({file})" if file else "")
    return f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())}; repair or remove it"


def _file(dataset: Dataset[Any], index: int) -> str | None:
    """The sample's file, if the data set has a list of paths, or of tuples that begin with a path (torchvision)."""
    for name in FILES:
        entries = getattr(dataset, name, None)
        if isinstance(entries, list | tuple | np.ndarray) and index < len(entries):
            entry = entries[index]
            path = entry[0] if isinstance(entry, list | tuple) and entry else entry
            if isinstance(path, str | PathLike):
                return str(fspath(path))
    return None
