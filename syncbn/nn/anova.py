r"""How much devices differ: the analysis of variance of one channel, in one classification (Fisher 1925, ch. VII).

``k`` devices hold ``n_r`` values of a channel, with mean ``m_r``; together they are ``n``, with mean ``m``. The sum of
squares about the mean is that between the devices and that within them:

    SST = sum (x - m)^2    SSB = sum_r n_r*(m_r - m)^2    SSW = SST - SSB

*Spread.* Deal the ``n`` values out to the devices at random, whatever they are: a device's mean then has the variance
``s^2*(1/n_r - 1/n)``, with ``s^2 = SST/(n - 1)`` (sampling without replacement: Cochran 1977, theorem 2.2). So the
expectation of ``SSB`` is ``(k - 1)*s^2``, exactly, for devices of any sizes, and

    spread = SSB/(k - 1) / s^2

is 1 by chance: the mean over devices of ``(m_r - m)^2`` over its variance, by the weights ``1 - n_r/n``. It is at most
``(n - 1)/(k - 1)``, where a device's values are all alike.

*Effective batch.* Values of one device that are alike (a domain of its own, neighbouring pixels) have an intraclass
correlation ``rho``, and the variance of their mean is ``sigma^2/n_r*(1 + (n_r - 1)*rho)``: what it would be for so
many times fewer independent values (the design effect: Kish 1965). The components of variance, unbiased for unequal
sizes too, are ``SSW/(n - k)`` within and ``(SSB/(k - 1) - SSW/(n - k))/n0`` between devices, with
``n0 = (n - sum n_r^2/n)/(k - 1)``, which is ``n/k`` where devices hold equally many (Searle, Casella & McCulloch
1992, ch. 3). ``sigma^2`` is their sum, and

    effective_batch = sigma^2 / (SSB/(k - 1) / n0)

is ``n0`` for independent values and 1 where a device's are all alike.

*Variance ratio.* ``SSW/SST`` is the devices' own (biased) variance over that of all: what a per-device layer divides
by, over what a synchronized one does. By chance it is ``(n - k)/(n - 1)``: a small batch underestimates.

All three say one thing, the share ``SSB/SST`` of the variance that lies between devices; it is averaged over channels,
each of them scaled to the same variance. A channel that does not vary has no such share and is left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.nn import statistics

_ROUNDING = 1e-12  # of the square of the mean: values in float32 that vary by less are one number


class Figures(NamedTuple):
    """What devices' batches say of one layer; NaN where fewer than two devices hold values, or none vary.

    They scatter from step to step, the more the fewer devices and channels there are. Over steps, take the mean of
    ``spread``, and the harmonic mean of ``effective_batch``, which is a reciprocal.

    Attributes:
        device_batch: values per channel on a device that holds any.
        group_batch: values that share statistics.
        spread: of the devices' means, over what chance gives.
        effective_batch: how many independent values a device's statistics are worth; NaN also where the devices' means
            are all the same, so that nothing can be told.
        variance_ratio: the devices' own variance over that of all.
    """

    device_batch: float
    group_batch: float
    spread: float
    effective_batch: float
    variance_ratio: float


def length(channels: int) -> int:
    """How many numbers :func:`share` gives."""
    return 3 * channels + 4


def share(sums: Tensor, group_n: Tensor) -> Tensor:
    """What one device adds to the total that :func:`figures` takes; a device without values adds zeros.

    Reads no value back to the host.

    Args:
        sums: of the device's values, :func:`syncbn.nn.statistics.pack`'s, of shape ``(2C + 1,)``.
        group_n: how many values share statistics with them, a float64 scalar.

    Returns:
        float64, shape ``(3C + 4,)``.
    """
    n, channels = sums[:1], len(sums) // 2
    holds = (n > 0).double()
    mean = sums[1 : channels + 1] / n.clamp_min(torch.finfo(sums.dtype).tiny)
    return torch.cat([sums, sums[1 : channels + 1] * mean, holds, n * n, holds * group_n])


def figures(total: Tensor) -> Figures | None:
    """The figures of all devices together; None where there was no value.

    Args:
        total: the sum over devices of their :func:`share`, on the CPU.
    """
    channels = (len(total) - 4) // 3
    sums, squared_means, counts = total.split([2 * channels + 1, channels, 3])
    n, mean, var = statistics.unpack(sums)
    size, (devices, squares, shared) = n.item(), counts.tolist()
    if size == 0:
        return None
    varies = var > _ROUNDING * mean * mean
    batches = (size / devices, shared / devices)
    if devices < 2 or not varies.any():
        return Figures(*batches, *[float("nan")] * 3)
    between = ((squared_means / n - mean * mean)[varies] / var[varies]).mean().clamp(0, 1).item()  # SSB / SST
    mean_square = between / (devices - 1)
    n0 = (size - squares / size) / (devices - 1)
    within = (1 - between) / max(size - devices, 1)  # one value each: n0 = 1, and there is no within
    variance = within * (1 - 1 / n0) + mean_square / n0
    effective = n0 * variance / mean_square if mean_square > 0 else float("nan")
    return Figures(*batches, mean_square * (size - 1), effective, 1 - between)
