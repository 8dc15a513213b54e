r"""How much the batches of devices differ: one-way analysis of variance for each channel (Fisher 1925, ch. VII).

``k`` devices hold ``n_r`` values of a channel, with mean ``m_r``; together they are ``n``, with mean ``m``. The sum of
squares about the mean is that between the devices and that within them:

    SST = sum (x - m)^2    SSB = sum_r n_r*(m_r - m)^2    SSW = SST - SSB

*Spread.* Assign the ``n`` values to the devices at random. A device's mean then has the variance
``s^2*(1/n_r - 1/n)``, with ``s^2 = SST/(n - 1)`` (sampling without replacement: Cochran 1977, theorem 2.2). So the
expectation of ``SSB`` is ``(k - 1)*s^2``, exactly, for devices of any sizes, and

    spread = SSB/(k - 1) / s^2

is 1 by chance: the mean over devices of ``(m_r - m)^2`` over its variance, by the weights ``1 - n_r/n``. It is at most
``(n - 1)/(k - 1)``, where a device's values are all alike.

*Effective batch.* Similar values on one device (one domain per device, neighbouring pixels) have an intraclass
correlation ``rho``, and the variance of their mean is ``sigma^2/n_r*(1 + (n_r - 1)*rho)``: what it would be for so
many times fewer independent values (the design effect: Kish 1965). The components of variance, unbiased for unequal
sizes too, are ``SSW/(n - k)`` within and ``(SSB/(k - 1) - SSW/(n - k))/n0`` between devices, with
``n0 = (n - sum n_r^2/n)/(k - 1)``, which is ``n/k`` where devices hold equally many (Searle, Casella & McCulloch
1992, ch. 3). ``sigma^2`` is their sum, and

    effective_batch = sigma^2 / (SSB/(k - 1) / n0)

is ``n0`` for independent values and 1 where a device's are all alike.

*Variance ratio.* ``SSW/SST`` is the devices' own (biased) variance over that of all: what a per-device layer divides
by, over what a synchronized one does. By chance it is ``(n - k)/(n - 1)``: a small batch underestimates.

All three depend on one number, the share ``SSB/SST`` of the variance that lies between devices, averaged over channels,
each of them scaled to the same variance. A channel that does not vary has no such share and is left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.nn import statistics

_ROUNDING = 1e-12  # of the square of the mean: values in float32 that vary by less are one number


class Figures(NamedTuple):
    """The figures of one layer; NaN where fewer than two devices hold values, or no channel varies.

    They scatter from step to step, more with fewer devices and channels. Over steps, take the mean of ``spread`` and
    the harmonic mean of ``effective_batch``, which is a reciprocal.

    Attributes:
        device_batch: values per channel on a device that holds any.
        group_batch: values that share statistics.
        spread: of the devices' means, divided by the spread by chance.
        effective_batch: how many independent values a device's statistics are worth; NaN also where the devices' means
            are all the same.
        variance_ratio: the devices' own variance over that of all.
    """

    device_batch: float
    group_batch: float
    spread: float
    effective_batch: float
    variance_ratio: float


class Layers:
    """Computes the figures of many layers together, in few operations.

    Args:
        channels: of each layer.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        self._lengths = [2 * c + 1 for c in channels]  # of their sums
        starts = [sum(self._lengths[:i]) for i in range(len(channels))]
        self._n_at = torch.tensor(starts, dtype=torch.long)
        self._layer = torch.tensor([i for i, c in enumerate(channels) for _ in range(c)], dtype=torch.long)
        at = [start + 1 + i for start, c in zip(starts, channels, strict=True) for i in range(c)]
        self._total_at = torch.tensor(at, dtype=torch.long)
        squares_at = self._total_at + torch.tensor(channels, dtype=torch.long)[self._layer]
        self._both_at = torch.cat([self._total_at, squares_at])

    def to(self, device: torch.device) -> "Layers":
        """Moves the index tensors to the device of the sums."""
        for name in ("_n_at", "_layer", "_total_at", "_both_at"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def share(self, sums: Sequence[Tensor | None], group_n: Sequence[Tensor | None]) -> Tensor:
        """One device's summand of the total that :meth:`figures` takes. Reads no value back to the host.

        Args:
            sums: of the device's values, layer by layer, as :func:`syncbn.nn.statistics.pack` returns them, shape
                ``(2C + 1,)``; None means zeros.
            group_n: how many values share statistics with them, float64 of shape ``(1,)``.

        Returns:
            float64, one dimension, ``3C + 4`` numbers a layer.
        """
        some = torch.zeros(max(self._lengths, default=1), dtype=torch.float64, device=self._layer.device)
        pairs = zip(sums, self._lengths, strict=True)
        everything = torch.cat([some[:0], *(some[:length] if each is None else each for each, length in pairs)])
        shared = torch.cat([some[:0], *(some[:1] if each is None else each for each in group_n)])
        n, total = everything[self._n_at], everything[self._total_at]
        holds = (n > 0).double()
        squared_mean = total * total / n.clamp_min(torch.finfo(n.dtype).tiny)[self._layer]
        return torch.cat([everything, squared_mean, holds, n * n, holds * shared])

    def figures(self, total: Tensor) -> list[Figures | None]:
        """The figures of all devices together, layer by layer; None for a layer that had no value.

        Args:
            total: the sum over devices of their :meth:`share`, where the layers are.
        """
        parts = (sum(self._lengths), len(self._layer), *[len(self._lengths)] * 3)
        sums, squared_means, holds, squares, shared = total.split(parts)
        n = sums[self._n_at]
        per_channel = n.clamp_min(1)[self._layer]
        # By n, the sums of all layers are those of one set of size one, with the same means and variances.
        one_set = torch.cat([total.new_ones(1), sums[self._both_at] / per_channel.repeat(2)])
        _, mean, var = statistics.unpack(one_set)
        mean_squared = mean * mean
        varies = var > _ROUNDING * mean_squared
        between = torch.where(varies, (squared_means / per_channel - mean_squared) / var, 0)
        added = total.new_zeros(2, len(n)).index_add_(1, self._layer, torch.stack([between, varies.double()]))
        columns = torch.stack([n, holds, squares, shared, *added]).T.tolist()
        return [_figures(*numbers) for numbers in columns]


def _figures(n: float, devices: float, squares: float, shared: float, between: float, varying: float) -> Figures | None:
    """From sums over devices, and over channels that vary."""
    if n == 0:
        return None
    batches = (n / devices, shared / devices)
    if devices < 2 or not varying:
        return Figures(*batches, *[float("nan")] * 3)
    between = min(max(between / varying, 0.0), 1.0)  # SSB / SST
    mean_square = between / (devices - 1)
    n0 = (n - squares / n) / (devices - 1)
    within = (1 - between) / max(n - devices, 1)  # one value each: n0 = 1, and there is no within
    variance = within * (1 - 1 / n0) + mean_square / n0
    effective = n0 * variance / mean_square if mean_square > 0 else float("nan")
    return Figures(*batches, mean_square * (n - 1), effective, 1 - between)
