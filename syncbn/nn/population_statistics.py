"""Precise statistics: the exact mean and variance of each layer over many batches replace the running averages."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn import rng
from syncbn.nn.comm import groups
from syncbn.nn.conversion import third_party
from syncbn.nn.conversion.convert import Only, batch_norms
from syncbn.nn.kernels import dispatch, running_statistics
from syncbn.nn.modules import Synchronized
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import BatchNormBase, buffers_restored


class MeasurementError(ValueError):
    """There is nothing to measure."""


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

    Every sample counts the same, so batches may be of unequal size, or empty on some ranks. The variance is the
    unbiased one over all samples (the biased one where the layer keeps that). The layers normalize as they do in
    training: synchronized ones with their group, others with this rank's batch, or its ghost batches. Dropout and
    all other modules are in evaluation mode, where the statistics will be used (with dropout the distribution would be
    another: Li et al. 2019). Only ``running_mean`` and ``running_var`` change: no gradient, flag, count of batches,
    other buffer or random number state. After an exception these are unchanged too.

    One float64 all-reduce at the end, of ``2C + 1`` numbers per layer, besides those of synchronized layers. All ranks
    get the same bits.

    Args:
        model: in training mode, frozen layers (in evaluation mode) are left alone; in evaluation mode, all layers are
            measured. A DistributedDataParallel is unwrapped.
        batches: on the model's device. Of a tuple or list the first part is the model's input, as in torch's
            ``update_bn``. Equally many on each rank where layers are synchronized; torch's own layers refuse a batch
            of one value per channel, as in training.
        num_batches: of each rank, at most.
        group: whose samples count: "world", "node", a number of consecutive ranks, a ProcessGroup, or a
            DeviceMesh of one dimension.
        only: which layers, as for :func:`syncbn.convert`.
        forward: called with each batch to run the model on it, instead of ``model(batch)``.

    Raises:
        MeasurementError: ``num_batches`` below 1; no batch norm layer with running statistics; on every rank, not one
            sample.
    """
    if num_batches < 1:
        raise MeasurementError(f"num_batches={num_batches}: use a whole number, 1 or more")
    if isinstance(model, DistributedDataParallel):  # which would broadcast the buffers before each batch
        model = model.module
    chosen = [layer for _, layer in batch_norms(model, only) if layer.training or not model.training]
    measured = {
        layer: running
        for layer in chosen
        if layer.track_running_stats and (running := running_statistics.of_layer(layer)) is not None
    }
    if not measured:
        raise MeasurementError(
            "precise statistics: there is no batch norm layer to measure that has running statistics"
        )
    run = forward or (lambda batch: model(model_input(batch)))
    with (
        rng.untouched(),
        _in_training(model, chosen),
        _sums(measured) as sums,
        torch.compiler.set_stance("force_eager"),  # compiled code calls no hooks
    ):
        for batch in islice(batches, num_batches):
            run(batch)
    total = torch.cat([sums[layer] for layer in measured])
    if (partners := groups.resolve(groups.parse(group))) is not None:
        dist.all_reduce(total, group=partners)
    pooled = total.split([len(sums[layer]) for layer in measured])
    if not any(float(each[0]) for each in pooled):
        raise MeasurementError("precise statistics: no sample came through a batch norm layer; give at least one batch")
    for (layer, running), each in zip(measured.items(), pooled, strict=True):
        biased = isinstance(layer, Synchronized) and layer.biased_running_var
        running_statistics.replace(*running, running_statistics.target(each, biased))
        if isinstance(layer, Simulated) and layer.rows is not None:
            for row, new in zip(layer.rows, running, strict=True):
                row.copy_(new)


def model_input(batch: Any) -> Any:
    """The first part of a tuple or list, as torch's ``update_bn`` takes it; otherwise the batch itself."""
    return batch[0] if isinstance(batch, list | tuple) and batch else batch


@contextmanager
def _in_training(model: nn.Module, chosen: list[BatchNormBase]) -> Iterator[None]:
    """These layers in training mode, all else in evaluation mode; afterwards flags and buffers are as before."""
    flags = [(module, module.training) for module in model.modules()]
    rows = [row for layer in chosen if isinstance(layer, Simulated) for row in layer.rows or ()]
    with buffers_restored(model, rows):
        try:
            for module, _ in flags:  # not train(), which a class may have made do more
                module.training = False
            for layer in chosen:
                layer.training = True
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@contextmanager
def _sums(layers: dict[BatchNormBase, tuple[Tensor, Tensor]]) -> Iterator[dict[BatchNormBase, Tensor]]:
    """Adds up the inputs of each layer, over all its calls, as sums of :mod:`syncbn.nn.statistics`."""
    found = {
        layer: torch.zeros(2 * layer.num_features + 1, dtype=torch.float64, device=mean.device)
        for layer, (mean, _) in layers.items()
    }

    def add_sums(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, BatchNormBase)
        found[layer] += dispatch.local_sums(*third_party.inputs(layer, args, kwargs)).sums

    handles = [layer.register_forward_pre_hook(add_sums, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
