"""Merges statistics of sample sets: moments become sums, ``comm.all_reduce`` adds them, sums become moments again.

The sums of one sample set are the vector ``[n, n*mean, n*(var + mean^2)]`` in float64: its length is ``2C + 1``, it
adds up exactly as the samples do, and an empty set is all zeros. Float64 is what makes it safe to subtract
``mean^2`` afterwards: 53 bits leave 1e-4 of the variance intact even where the mean is 1e5 standard deviations
away from zero. The pairwise formula of Chan, Golub & LeVeque (1983, eq. 2.1) merges two sets with the same
result, but a sum of vectors is what a collective can do.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.nn import tracing


class Moments(NamedTuple):
    """Count, mean and variance per channel of one set of samples.

    Attributes:
        n: how many values a channel has; a float64 scalar (it may be a sum of weights).
        mean: shape ``(C,)``, float64.
        var: shape ``(C,)``, float64; the biased variance, that is, divided by ``n``.
    """

    n: Tensor
    mean: Tensor
    var: Tensor

    def unbiased(self) -> "Moments":
        """The same with the variance divided by ``n - 1``; for ``n < 2`` it stays the biased one."""
        n = number_or_tensor(self.n)
        return self._replace(var=self.var * (n / ((n - 1).clamp_min(1) if isinstance(n, Tensor) else max(n - 1, 1))))


def pack(moments: Moments) -> Tensor:
    """The sums of a set with these moments: float64, shape ``(2C + 1,)``, in the layout of the module's docstring."""
    n, mean, var = (t.double() for t in moments)
    return torch.cat([n.reshape(1), n * mean, n * (var + mean * mean)])


def unpack(sums: Tensor) -> Moments:
    """The moments of the set with these sums. An empty set has mean 0 and variance 0; nothing is ever NaN.

    Reads no value back to the host, so it may run on a GPU's stream, in a CUDA graph, or under ``torch.compile``.
    """
    n = sums[0]
    channels = len(sums) // 2
    _, mean, square = (sums / n.clamp_min(torch.finfo(sums.dtype).tiny)).split([1, channels, channels])
    # For a constant channel rounding can make the difference slightly negative.
    var = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
    return Moments(n, mean, var)


def number_or_tensor(n: Tensor) -> Tensor | float:
    """A scalar as a number if the host can read it without waiting, else as the tensor that it is."""
    return n.item() if may_read(n) else n


def may_read(x: Tensor) -> bool:
    """Whether the host may read a value of ``x``: no wait for a device, no break of a compiled graph or transform."""
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling() and not tracing.transformed()
