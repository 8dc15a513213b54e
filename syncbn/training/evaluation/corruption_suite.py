"""A callback that tests on corrupted images, with running statistics and with statistics adapted to these images."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import syncbn
from syncbn.nn import rng
from syncbn.nn.conversion.convert import batch_norms
from syncbn.training.data import corruptions
from syncbn.training.data.loaders import BatchLoader
from syncbn.training.data.samplers import this_rank, world_size
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.lightning_internals import logged_step

ORDER_SEED = 0  # seed of the order in which images are put into batches; files are often sorted by class
CURVE = ("batch_sizes", "priors", "severities", "images")


class CorruptionSuite(pl.Callback):
    """Measures and logs the accuracy on corrupted images when a test ends, with the weights of the test.

    The images are those of the test, from a map-style data set of images in [0, 1] and labels. Calling the
    LightningModule maps them to scores. Their random order and their corruption are the same in every run. The ranks
    take whole batches round-robin, so the results equal those of one process; there is one all-reduce at the end. Each
    rank holds all images in memory.

    Attributes:
        result: accuracies of the last test, by parts of ``result.json``.

            - ``corrupted``, with the model in evaluation mode: ``corrupted/acc``, the mean over kinds and severities;
              ``corrupted/acc_KIND``, over severities; ``corrupted/acc_severity1`` to ``5``, over kinds.
            - ``adapted``, with batch norm adapted to each batch (:func:`syncbn.adapt`): the same names, and with
              ``curve`` also, for example, ``adapted/acc_n4_N16``, for batches of 4 and a prior of 16, over all kinds
              and the curve's severities. Left out if no batch norm layer has running statistics.
            - ``clean``, with ``curve``: for example ``clean/acc_n4_N16``, on uncorrupted images.

    Args:
        kinds: some of :data:`syncbn.training.data.corruptions.KINDS`.
        severities: some of 1 to 5.
        batch_size: maximum number of images to adapt to together; batches are of equal size, to one image.
        prior: number of samples that the running statistics count as in adapting; 0 to use the batch only.
        curve: ``batch_sizes`` and ``priors``, of which all combinations are tested; the ``severities`` for these tests;
            and ``images``, the maximum number of images, the same for every size. Each size must divide the largest.
            None for no curve.

    Raises:
        SettingError: an invalid argument; when training or a test begins, unsuitable images or data set, a module
            without ``forward``, or a batch size of the curve above the number of images.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        severities: Sequence[int],
        *,
        batch_size: int = 128,
        prior: float = 0.0,
        curve: Mapping[str, Any] | None = None,
    ) -> None:
        _check(kinds, severities, "corruptions.severities")
        _check_whole("corruptions.batch_size", batch_size, 1)
        if isinstance(prior, bool) or not isinstance(prior, int | float) or not prior >= 0:
            raise SettingError("corruptions.prior", prior, "use a number of samples, 0 (the batch alone) or more")
        if curve is not None:
            _check_curve(kinds, curve)
        self.kinds, self.severities, self.curve = kinds, severities, curve
        self.batch_size, self.prior = batch_size, prior
        self.result: dict[str, dict[str, float]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module and the test data before training, not after it."""
        datamodule = getattr(trainer, "datamodule", None)
        if not is_overridden("forward", pl_module, pl.LightningModule):
            raise AgreedError(
                "corruptions",
                hint=f"{type(pl_module).__name__} has no forward(); give it one that maps images to scores",
            )
        if stage == "fit" and datamodule is not None:
            with rng.untouched():
                datamodule.setup("test")
                self._check_data(datamodule.test_dataloader())

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with rng.untouched():
            self._check_data(trainer.test_dataloaders)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader: Any = trainer.test_dataloaders
        with rng.untouched():
            images, labels = _samples(loader, range(len(loader.dataset)))
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(ORDER_SEED))
            scoring = _Scoring(trainer, pl_module, labels[order])
            self._measure(scoring, images[order])
        self.result = scoring.result()
        for logger in trainer.loggers:
            for part in self.result.values():
                logger.log_metrics(part, step=logged_step(trainer))
            logger.save()

    def _check_data(self, loader: Any) -> None:
        """Check the type of the data set, and about 16 images spread evenly over it."""
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise AgreedError(
                "corruptions",
                hint=f"the test data are a {type(loader).__name__}; use one DataLoader over a map-style set",
            )
        number = len(loader.dataset)  # type: ignore[arg-type]  # a map-style data set of a test has a length
        images, _ = _samples(loader, range(0, number, -(-number // 16)))
        corruptions.check_images(images, "corruptions")
        if self.curve is not None and max(self.curve["batch_sizes"]) > number:
            raise AgreedError(
                "corruptions.curve.batch_sizes",
                self.curve["batch_sizes"],
                f"the test has {number} images; use at most {number}, or corruptions.curve=null",
            )

    def _measure(self, scoring: "_Scoring", images: Tensor) -> None:
        batches = _equal_batches(len(images), self.batch_size)
        for kind, severity in product(self.kinds, self.severities):
            corrupted = corruptions.corrupt(images, kind, severity)
            names = [f"acc{suffix}" for suffix in ("", f"_{kind}", f"_severity{severity}")]
            scoring.count("corrupted", names, corrupted, batches)
            if scoring.adapts:
                with syncbn.adapt(scoring.model, prior=self.prior, group=1):
                    scoring.count("adapted", names, corrupted, batches)
        if scoring.adapts and self.curve is not None:
            self._measure_curve(scoring, "clean", images, self.curve)
            for kind, severity in product(self.kinds, self.curve["severities"]):
                self._measure_curve(scoring, "adapted", corruptions.corrupt(images, kind, severity), self.curve)

    def _measure_curve(self, scoring: "_Scoring", part: str, images: Tensor, curve: Mapping[str, Any]) -> None:
        largest = max(curve["batch_sizes"])
        number = min(len(images), curve["images"]) // largest * largest
        for prior in curve["priors"]:
            with syncbn.adapt(scoring.model, prior=prior, group=1):
                for size in curve["batch_sizes"]:
                    batches = [slice(start, start + size) for start in range(0, number, size)]
                    scoring.count(part, [f"acc_n{size}_N{prior}"], images, batches)


class _Scoring:
    """Counts correct predictions of a model in this rank's share of the batches, and sums them over the ranks."""

    def __init__(self, trainer: pl.Trainer, model: pl.LightningModule, labels: Tensor) -> None:
        self.model, self.adapts = model, any(layer.running_mean is not None for _, layer in batch_norms(model))
        self._trainer, self._labels = trainer, labels.to(model.device)
        self._right: dict[tuple[str, str], Tensor] = {}
        self._all: dict[tuple[str, str], int] = {}

    def count(self, part: str, names: Sequence[str], images: Tensor, batches: Sequence[slice]) -> None:
        """Count the predictions for ``batches`` of ``images`` towards the accuracies ``names``."""
        right = torch.zeros((), dtype=torch.long, device=self.model.device)
        images = self._trainer.precision_plugin.convert_input(images).to(self.model.device)
        with torch.inference_mode(), self._trainer.precision_plugin.test_step_context():
            for batch in batches[this_rank() :: world_size()]:
                right += (self.model(images[batch]).argmax(1) == self._labels[batch]).sum()
        for name in names:
            key = part, f"{part}/{name}"
            self._right[key] = self._right.get(key, 0) + right
            self._all[key] = self._all.get(key, 0) + sum(batch.stop - batch.start for batch in batches)

    def result(self) -> dict[str, dict[str, float]]:
        """The accuracies over all ranks, by part and name; one all-reduce."""
        right = torch.stack([*self._right.values()])
        if dist.is_initialized():
            dist.all_reduce(right)
        found: dict[str, dict[str, float]] = {}
        for (part, name), number in zip(self._right, right.tolist(), strict=True):
            found.setdefault(part, {})[name] = number / self._all[part, name]
        return found


def _samples(loader: DataLoader[Any], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and labels at ``indices`` of the data set, independent of this rank's share."""
    if isinstance(loader, BatchLoader):  # its data set is indexed by lists and returns batches
        batch = loader.dataset[list(indices)]
    else:
        batch = loader.collate_fn([loader.dataset[i] for i in indices])
    images, labels, *_ = batch
    return images, labels


def _equal_batches(number: int, max_size: int) -> list[slice]:
    """Split ``number`` images into as few batches of at most ``max_size`` as possible, of equal size to one image."""
    count = -(-number // max_size)
    edges = [number * i // count for i in range(count + 1)]
    return [slice(*each) for each in pairwise(edges)]


def _check(kinds: Sequence[str], severities: Sequence[int], name: str) -> None:
    for values, setting in ((kinds, "corruptions.kinds"), (severities, name)):
        if not values or len(set(values)) < len(values):
            raise SettingError(setting, list(values), "use one or more, each once")
    for kind, severity in product(kinds, severities):
        corruptions.check(kind, severity, ("corruptions.kinds", name))


def _check_curve(kinds: Sequence[str], curve: Mapping[str, Any]) -> None:
    if set(curve) != set(CURVE):
        raise SettingError("corruptions.curve", dict(curve), f"use null, or all of {', '.join(CURVE)}")
    _check(kinds, curve["severities"], "corruptions.curve.severities")
    _check_whole("corruptions.curve.images", curve["images"], 1)
    for name, least in (("batch_sizes", 1), ("priors", 0)):
        if not curve[name]:
            raise SettingError(f"corruptions.curve.{name}", [], "use one or more")
        for value in curve[name]:
            _check_whole(f"corruptions.curve.{name}", value, least)
    sizes, largest = list(curve["batch_sizes"]), max(curve["batch_sizes"])
    if any(largest % size for size in sizes):
        raise SettingError(
            "corruptions.curve.batch_sizes",
            sizes,
            f"use divisors of the largest, {largest}, so that all sizes use the same images",
        )
    if curve["images"] < largest:
        images = curve["images"]
        raise SettingError("corruptions.curve.images", images, f"use at least the largest batch, {largest}")


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingError(name, value, f"use whole numbers, {least} or more")
