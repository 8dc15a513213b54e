"""Population statistics ("precise batch norm", Wu & Johnson 2021): measured with fixed weights, in place of averages.

The running statistics are an average over batches that other weights saw, the last of them most. Here the weights stand
still: over ``k`` batches, on all ranks, each batch norm layer's own input is added up while the layers before it
normalize as they do in training. With the batches' means ``mu_B`` and variances ``var_B`` the population has the mean
``E[mu_B]`` and the variance ``E[mu_B^2 + var_B] - E[mu_B]^2`` (Wu & Johnson 2021, section 3.2), the expectation taken
over samples. So it does not matter how the samples were cut into batches, groups or ghost batches.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from syncbn.nn import statistics
from syncbn.nn.comm import groups
from syncbn.nn.conversion import third_party
from syncbn.nn.conversion.convert import Only, batch_norms
from syncbn.nn.kernels import dispatch
from syncbn.nn.modules import Synchronized
from syncbn.nn.simulation import Simulated
from syncbn.training import rng
from syncbn.training.config.schema import AgreedError, SettingError
from syncbn.training.data import samplers
from syncbn.training.data.digits import train_loader
from syncbn.training.data.loaders import TrainLoader
from syncbn.training.evaluation.repeat_test import retest

FROZEN = "frozen_norms"  # in a checkpoint: the layers that training left in evaluation mode


@torch.no_grad()
def precise_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 200,
    group: object = "world",
    *,
    only: Only = None,
    forward: Callable[[Any], Any] | None = None,
) -> None:
    """Sets every batch norm's running statistics to those of its inputs over these batches and all ranks, in place.

    Right where batches are of unequal size, or empty on some ranks: samples count, not batches. The variance is the
    unbiased one over all samples (the biased one where the layer keeps that). The layers normalize as they do in
    training: synchronized ones with their group, others with this rank's batch, or its ghost batches. Dropout and
    whatever else behaves differently in training is in evaluation, since that is where the statistics will be used
    (with dropout they would be of another distribution: Li et al. 2019). Nothing but ``running_mean`` and
    ``running_var`` changes: no gradient, flag, count of batches, other buffer or random number; if anything raises,
    these neither.

    One float64 all-reduce at the end, of ``2C + 1`` numbers per layer, besides what synchronized layers send. All ranks
    end with the same bits.

    Args:
        model: in training mode, frozen layers (in evaluation mode) are left alone; in evaluation mode, all layers are
            measured. What DistributedDataParallel wraps is taken out of it.
        batches: on the model's device. Of a tuple or list the first part is the model's input, as in torch's
            ``update_bn``. Equally many on each rank where layers are synchronized; torch's own layers refuse a batch
            of one value per channel, as in training.
        num_batches: of each rank, at most.
        group: whose samples count: "world", "node", a number of consecutive ranks, a ProcessGroup, or a
            DeviceMesh of one dimension.
        only: which layers, as for :func:`syncbn.convert`.
        forward: called with each batch instead, to run the model on it.

    Raises:
        SettingError: ``num_batches`` below 1; no batch norm layer with running statistics; on every rank, not one
            sample.
    """
    if num_batches < 1:
        raise SettingError(f"num_batches={num_batches}: use a whole number, 1 or more")
    if isinstance(model, DistributedDataParallel):  # which would broadcast the buffers before each batch
        model = model.module
    chosen = [layer for _, layer in batch_norms(model, only) if layer.training or not model.training]
    measured = [
        layer
        for layer in chosen
        if layer.running_mean is not None and layer.running_var is not None and layer.track_running_stats
    ]
    if not measured:
        raise SettingError("precise statistics: there is no batch norm layer to measure that has running statistics")
    run = forward or (lambda batch: model(_input(batch)))
    with (
        rng.untouched(),
        _in_training(model, chosen),
        _sums(measured) as sums,
        torch.compiler.set_stance("force_eager"),  # compiled code calls no hooks
    ):
        for batch in islice(batches, num_batches):
            run(batch)
    message = torch.cat([sums[layer] for layer in measured])
    if (partners := groups.resolve(groups.parse(group))) is not None:
        dist.all_reduce(message, group=partners)
    pooled = message.split([len(sums[layer]) for layer in measured])
    if not any(float(each[0]) for each in pooled):
        raise SettingError("precise statistics: no sample came through a batch norm layer; give at least one batch")
    for layer, each in zip(measured, pooled, strict=True):
        _set(layer, each)


def _set(layer: _BatchNorm, sums: Tensor) -> None:
    moments = statistics.unpack(sums)
    biased = isinstance(layer, Synchronized) and layer.biased_running_var
    assert layer.running_mean is not None
    assert layer.running_var is not None
    if moments.n >= 1:  # a layer that no batch went through keeps what it has
        layer.running_mean.copy_(moments.mean)
    if moments.n >= 2:
        layer.running_var.copy_(moments.var if biased else moments.unbiased().var)
    if isinstance(layer, Simulated) and layer.rows is not None:
        for row, running in zip(layer.rows, (layer.running_mean, layer.running_var), strict=True):
            row.copy_(running)


def _input(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) else batch


@contextmanager
def _in_training(model: nn.Module, chosen: list[_BatchNorm]) -> Iterator[None]:
    """These layers in training mode, all else in evaluation mode; afterwards flags and buffers are as before."""
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    homes = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    values += [(row, row.clone()) for layer in chosen if isinstance(layer, Simulated) for row in layer.rows or ()]
    try:
        for module in modules:  # not train(), which a class may have made do more
            module.training = False
        for layer in chosen:
            layer.training = True
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for home, names in homes:
            home.update(names)
        for buffer, value in values:
            buffer.copy_(value)


@contextmanager
def _sums(layers: list[_BatchNorm]) -> Iterator[dict[_BatchNorm, Tensor]]:
    """Adds up what each layer is given, as sums of :mod:`syncbn.nn.statistics`; a layer that is called twice, both."""
    found = {
        layer: torch.zeros(2 * layer.num_features + 1, dtype=torch.float64, device=layer.running_mean.device)
        for layer in layers
        if layer.running_mean is not None
    }

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        found[layer] += dispatch.local_sums(*third_party.inputs(layer, args, kwargs)).sums

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class PreciseStatistics(pl.Callback):
    """Measures population statistics (:func:`precise_statistics`) before each validation, or when training ends.

    As detectron2's hook of this name: what is validated, and then saved as the best checkpoint, has them. The running
    averages go on from them in training, which does not look at them. The batches come from a loader of its own over
    the training data, in the order that the epoch has, so training's loaders, random numbers and resume points are
    left as they are.

    Args:
        num_batches: of each rank. Where an epoch has fewer, the next one's order follows.
        every_n_epochs: before the validations of each n-th epoch; None for the end of the last epoch alone, after its
            validations and before its checkpoints are written. What says then which epoch is the last is max_epochs,
            max_steps, and ``trainer.should_stop``. Checkpoints of earlier epochs have the running averages.
        before_test: also when a test begins, with the weights that are tested.
        only: which layers, as for :func:`syncbn.convert`; names begin at the LightningModule.
        batches: called without arguments, gives other batches to measure.
        forward: called with the LightningModule and a batch, runs it; by default the module is called with the batch,
            or its first part.

    Raises:
        SettingError: a number below 1; when training begins, with ``every_n_epochs=None``, an EarlyStopping, which may
            end training after the last epoch's end has been dealt with, or a ModelCheckpoint that saves with
            validations, before it; when it measures, training data that it cannot make a loader of its own for, or
            what :func:`precise_statistics` raises.
    """

    def __init__(
        self,
        num_batches: int = 200,
        *,
        every_n_epochs: int | None = 1,
        before_test: bool = False,
        only: Only = None,
        batches: Callable[[], Iterable[Any]] | None = None,
        forward: Callable[[pl.LightningModule, Any], Any] | None = None,
    ) -> None:
        for name, value in (("num_batches", num_batches), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise SettingError(f"PreciseStatistics: {name}={value}: use a whole number, 1 or more")
        self.num_batches, self.every_n_epochs, self.before_test = num_batches, every_n_epochs, before_test
        self.only, self.batches, self.forward = only, batches, forward
        self._frozen: set[str] = set()
        self._measured_at: int | None = None  # the step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._look_for_frozen(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for each in trainer.callbacks if self.every_n_epochs is None else ():  # type: ignore[attr-defined]
            late = isinstance(each, ModelCheckpoint) and not each._should_save_on_train_epoch_end(trainer)
            if late or isinstance(each, EarlyStopping):
                why = "saves with validations, before the last epoch's end" if late else "may end training at any epoch"
                raise AgreedError(
                    f"PreciseStatistics: every_n_epochs=None: {type(each).__name__} {why}, so what is saved last would "
                    "not have them; use every_n_epochs=1"
                )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._look_for_frozen(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.every_n_epochs is None:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning calls ModelCheckpoint after all others here; a resume point is written later still.
        if self.every_n_epochs is None and _is_last_epoch(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._measured_at != trainer.global_step:
            self._measure(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before_test:
            with _synchronized(trainer, pl_module):
                self._measure(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._frozen |= set(checkpoint.get(FROZEN, ()))

    def _look_for_frozen(self, pl_module: pl.LightningModule) -> None:
        """Layers that training leaves in evaluation mode; in an evaluation all are."""
        if pl_module.training:
            self._frozen = {name for name, layer in batch_norms(pl_module) if not layer.training}

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        thawed = {layer for name, layer in batch_norms(pl_module, self.only) if name not in self._frozen}

        def run(batch: Any) -> None:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.train_step_context():
                pl_module(_input(batch)) if self.forward is None else self.forward(pl_module, batch)

        with rng.untouched():
            batches = _training_batches(trainer) if self.batches is None else self.batches()
            precise_statistics(
                pl_module, batches, self.num_batches, only=lambda name, layer: layer in thawed, forward=run
            )
        self._measured_at = trainer.global_step


def _is_last_epoch(trainer: pl.Trainer) -> bool:
    """Whether the epoch that is being ended is; ``fit_loop.done`` would say, but counts while it does."""
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # the tracker is one that has it
    limits = (loop.epoch_loop.global_step, loop.max_steps), (epochs, loop.max_epochs)
    if any(most is not None and -1 != most <= reached for reached, most in limits):
        return True
    return bool(trainer.should_stop and loop._can_stop_early)


def test_precisely(trainer: Any, pl_module: pl.LightningModule, num_batches: int, **options: Any) -> dict[str, Any]:
    """The test once more, with population statistics over so many training batches.

    Args:
        trainer: it has fitted and tested this module.
        options: further arguments of ``trainer.test``.

    Returns:
        What the test gives, ``precise/acc`` for ``test/acc`` and so on; it is logged under these names.
    """
    callback = PreciseStatistics(num_batches, every_n_epochs=None, before_test=True)
    trainer.callbacks.append(callback)
    try:
        return retest(trainer, pl_module, "precise", **options)
    finally:
        trainer.callbacks.remove(callback)


@contextmanager
def _synchronized(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """The layers as they are in training: Lightning synchronizes them while it fits alone."""
    sync = getattr(trainer.strategy, "_layer_sync", None)
    if sync is not None:
        sync.apply(pl_module)
    try:
        yield
    finally:
        if sync is not None:
            sync.revert(pl_module)


def _training_batches(trainer: Any) -> Iterator[Any]:
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


def own_loader(
    loader: Any, who: str = "PreciseStatistics", instead: str = "give it batches=, a function that returns batches"
) -> TrainLoader:
    """A loader over the same data as this one, which it leaves alone.

    Args:
        loader: of training data.
        who: wants it, for the message.
        instead: what to do where there can be none, likewise.

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
    raise AgreedError(
        f"{who}: of the training data ({type(loader).__name__}) it cannot make a loader of its own; {instead}"
    )
