"""Turns a normalization batch, the samples that share statistics, into ``group`` and ``ghost_batch`` of the layer.

It is the one number to choose (Wu & Johnson 2021).
"""

from typing import NamedTuple


class NormalizationBatch(NamedTuple):
    """The layer settings that result in a normalization batch.

    Attributes:
        group: consecutive ranks that share statistics, or "world".
        ghost_batch: samples of one device that share them, if fewer than it holds; else None.
    """

    group: int | str
    ghost_batch: int | None


def normalization_batch(size: int, device_batch: int, world: int) -> NormalizationBatch:
    """Picks ghost batches or a group of devices so that ``size`` samples share statistics.

    Args:
        size: samples wanted.
        device_batch: samples on each device.
        world: devices.

    Raises:
        ValueError: a size that is neither an equal part of a device's batch nor the batches of a number of devices that
            divides ``world``; it names the sizes that work.
    """
    if size == device_batch * world:
        return NormalizationBatch("world", None)
    if 0 < size < device_batch and device_batch % size == 0:
        return NormalizationBatch(1, size)
    if size > 0 and size % device_batch == 0 and world % (size // device_batch) == 0:
        return NormalizationBatch(size // device_batch, None)
    ghosts = [n for n in range(1, device_batch) if device_batch % n == 0]
    groups = [device_batch * n for n in range(1, world + 1) if world % n == 0]
    raise ValueError(
        f"batch_size={size} samples cannot share statistics with {device_batch} on each of {world} devices; "
        f"sizes that work: {', '.join(map(str, ghosts + groups))}"
    )
