"""Measures what batch statistics reveal about which samples share a device. It needs no Lightning."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn import rng
from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.shuffling import Shuffled, shuffle
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import buffers_restored
from syncbn.training.distributed.gather_rows import gather_rows
from syncbn.training.models.contrastive.losses import nearest_is_partner

Embed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Found = Callable[[Tensor, Tensor], Tensor]


class Leak(NamedTuple):
    """The pretext accuracy with both views of an image on one device, and with the second views on other devices."""

    together: float
    spread: float

    @property
    def difference(self) -> float:
        """What statistics reveal; 0 where they are shared by all devices, or do not depend on the batch."""
        return self.together - self.spread


def measure_leak(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 20,
    *,
    embed: Embed | None = None,
    found: Found = nearest_is_partner,
) -> Leak:
    """Measure how much per-device statistics of batch norm help to find the other view of an image.

    The pretext accuracy is the share of views whose nearest view in the batch of all devices is of the same image. It
    is measured twice on the same views: with both views of an image on one device, and with the second views spread
    over the other devices (:func:`spread_over_devices`). Only the samples that share statistics differ.

    Batch norm layers normalize as in training, with the devices' statistics: those of ranks, or of devices simulated
    by :func:`syncbn.nn.simulation.simulate`. Frozen layers (in evaluation mode within a model in training mode) stay
    frozen. Other layers are in evaluation mode. Nothing is trained or changed: no parameter, buffer, flag or random
    state.

    Args:
        model: maps images of shape ``(N, *)`` to embeddings ``(N, D)``. A DistributedDataParallel is unwrapped.
        batches: tuples that begin with two views, each of shape ``(N, *)``, on the model's device; equally many images
            on each rank. For simulated devices N is a multiple of their number. Use images that were not trained on.
        num_batches: of each rank, at most.
        embed: maps two views to their embeddings, as the training step does; None for one call of the model on both
            views joined.
        found: maps the embeddings of all devices to booleans, which of them have their partner nearest.

    Returns:
        The two accuracies, the same on all ranks.

    Raises:
        ValueError: ``num_batches`` below 1; there is no batch.

    Example::

        leak = measure_leak(encoder, ((view_1, view_2) for view_1, view_2, _ in held_out))
        print(leak.together, leak.spread, leak.difference)
    """
    if num_batches < 1:
        raise ValueError(f"num_batches={num_batches}: use a whole number, 1 or more")
    if isinstance(model, DistributedDataParallel):  # which would broadcast the buffers before each batch
        model = model.module
    embed = embed or (lambda first, second: _joined(model, first, second))
    right, views = [0.0, 0.0], 0
    with as_in_training(model):
        for first, second, *_ in islice(batches, num_batches):
            moved = _spread(model, second)
            one, two = embed(first, moved.samples)
            pairs = embed(first, second), (one, moved.restore(two))
            for arrangement, pair in enumerate(pairs):
                rows, _ = gather_rows(torch.cat(pair, dim=1))
                hits = found(*rows.chunk(2, dim=1))
                right[arrangement] += float(hits.double().sum())
            views += len(hits)
    if not views:
        raise ValueError("measure_leak: there is no image to measure; give at least one batch")
    return Leak(right[0] / views, right[1] / views)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Batch norm normalizes as in training, without gradients; at the end everything is as it was before."""
    flags = [(module, module.training) for module in model.modules()]
    normalizing = {layer for _, layer in batch_norms(model) if layer.training or not model.training}
    rows = [row for layer in normalizing if isinstance(layer, Simulated) for row in layer.rows or ()]
    with rng.untouched(), buffers_restored(model, rows), torch.no_grad():
        try:
            for module, _ in flags:  # not train(), which a class may have made do more
                # The hooks of norm=shuffle read the flag of a container. Dropout has no children.
                module.training = module in normalizing or any(True for _ in module.children())
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def _joined(model: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    one, two = model(torch.cat([first, second])).chunk(2)
    return one, two


def spread_over_devices(samples: int, devices: int) -> Tensor:
    """A permutation that takes each sample to another device, and samples of one device to different ones.

    Sample ``i`` is on device ``i % devices``, so these are the numbers of :func:`syncbn.shuffle`. Sample ``k`` of a
    device goes to the device ``1 + k % (devices - 1)`` after it, as its ``k``-th sample. To move all of them to the
    next device would not be enough: networks that are called on each view separately would normalize the same samples
    together.

    Args:
        samples: of all devices together, a multiple of ``devices``.
        devices: with one, each sample goes to the next place.

    Returns:
        For each place the number of the sample that goes there, shape ``(samples,)``.
    """
    if devices == 1:
        return torch.arange(samples).roll(1)
    number, device = torch.arange(samples) // devices, torch.arange(samples) % devices
    place = number * devices + (device + 1 + number % (devices - 1)) % devices
    return place.argsort()


def _spread(model: nn.Module, x: Tensor) -> Shuffled:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    simulated = {layer.devices for layer in model.modules() if isinstance(layer, Simulated)}
    return shuffle(x, permutation=spread_over_devices(len(x) * ranks, max(simulated, default=ranks)))
