"""Simulates several devices in one process: batch norm with the statistics that each device would have.

Sample ``i`` of a batch belongs to device ``i % devices``, which is how a distributed sampler splits a global batch.
With ``accumulate`` a batch is several such global batches, one after the other, of one optimizer step. One process then
trains as that many ranks would, to rounding, without communication.
"""

from math import prod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.nn import functional
from syncbn.nn.conversion.convert import Only, batch_norms, predicate, refuse_hidden
from syncbn.nn.kernels import running_statistics
from syncbn.nn.statistics import Moments, pack, unpack
from syncbn.nn.torch_internals import BatchNormBase

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Simulated(BatchNormBase):
    """The forward pass of simulated layers; mixed in before a torch batch norm class by :func:`simulate`.

    Attributes:
        devices: how many are simulated.
        sharing: consecutive devices that share statistics; 1 for per-device statistics.
        ghost_batch: samples of a device that share statistics, if fewer than it holds; None for all.
        accumulate: global batches in one batch, which move the running statistics in turn.
        rows: the running mean and variance of each device, shapes ``(devices, C)``, if each device keeps
            its own until :meth:`pool`. None if only the first device's count, as in DistributedDataParallel: then they
            are the layer's buffers.

    Shape:
        Input and output as of the torch class, ``N`` a multiple of ``devices * accumulate``.

    Raises:
        ValueError: in training, samples that the devices, or ghost batches, cannot share equally; one value a channel.
    """

    devices: int
    sharing: int
    ghost_batch: int | None
    accumulate: int
    rows: tuple[Tensor, Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        samples, channels, *positions = input.shape
        share = self.devices * self.accumulate
        size = self.ghost_batch or max(samples // share, 1)
        if samples % (size * share):
            raise ValueError(
                f"{samples} samples cannot be cut into batches of {size} on each of {self.devices} devices"
            )
        if size * self.sharing * prod(positions) == 1:
            # torch's check would name the shape of all devices' channels together.
            size_of_device = torch.Size([1, channels, *positions])
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size_of_device}")
        # (chunk, sample, group, device in it, ...): samples that share statistics become the batch, all other
        # dimensions join the channels, and one call of torch's kernel normalizes them all.
        cut = input.reshape(-1, size, self.devices // self.sharing, self.sharing, channels, *positions)
        chunks, groups = cut.shape[0], cut.shape[2]
        x = cut.permute(1, 3, 0, 2, *range(4, cut.dim())).reshape(size * self.sharing, -1, *positions)
        dtype = torch.promote_types(x.dtype, torch.float32)  # statistics are never in half precision
        mean, var = x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype)
        weight, bias = (None if p is None else p.to(dtype).repeat(chunks * groups) for p in (self.weight, self.bias))
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=self.eps)
        shape = (self.accumulate, -1, groups, channels)
        self._learn(x.numel() // x.shape[1], *(each.view(shape).double().mean(1) for each in (mean, var)))
        y = y.view(size, self.sharing, chunks, groups, channels, *positions)
        return y.permute(2, 0, 3, 1, *range(4, cut.dim())).reshape(input.shape)

    @torch.no_grad()
    def _learn(self, n: int, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics by batches in turn; means and unbiased variances ``(accumulate, groups, C)``."""
        running = running_statistics.of_layer(self)
        if running is None or not self.track_running_stats or functional.recomputing():
            return
        weights, share = running_statistics.in_turn(self.accumulate, self.num_batches_tracked, self.momentum)
        weights = weights.to(mean.device)
        mean, var = (torch.einsum("a,agc->gc", weights, each) for each in (mean, var))
        count = mean.new_tensor(n)
        if self.rows is None:
            running_statistics.move(*running, Moments(count, mean[0], var[0]), share)
        else:
            of_devices = (each.repeat_interleave(self.sharing, dim=0) for each in (mean, var))
            running_statistics.move(*self.rows, Moments(count, *of_devices), share)

    @torch.no_grad()
    def pool(self) -> None:
        """Pools the running statistics of all devices, and sets each device's ``rows`` to the result."""
        running = running_statistics.of_layer(self)
        if self.rows is None or running is None or not self.track_running_stats:
            return
        _, mean, var = self.pooled()
        for own, row, pooled in zip(running, self.rows, (mean, var), strict=True):
            own.copy_(pooled)
            row.copy_(pooled)

    @torch.no_grad()
    def pooled(self) -> Moments:
        """The pooled running statistics of all devices, in float64; each device keeps its own ``rows``."""
        assert self.rows is not None
        one = torch.ones((), dtype=torch.float64, device=self.rows[0].device)
        sums = [pack(Moments(one, mean, var)) for mean, var in zip(*self.rows, strict=True)]
        return unpack(torch.stack(sums).sum(0))


class _Simulated1d(Simulated, nn.BatchNorm1d):
    pass


class _Simulated2d(Simulated, nn.BatchNorm2d):
    pass


class _Simulated3d(Simulated, nn.BatchNorm3d):
    pass


_TWINS: dict[type[nn.Module], type[Simulated]] = {
    nn.BatchNorm1d: _Simulated1d,
    nn.BatchNorm2d: _Simulated2d,
    nn.BatchNorm3d: _Simulated3d,
}
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {twin: original for original, twin in _TWINS.items()}
SIMULATED = tuple(_TWINS) + tuple(_ORIGINALS)  # classes that can be simulated, and those that simulate
_OPTIONS = ("devices", "sharing", "ghost_batch", "accumulate", "rows")


def simulate(
    module: AnyModule,
    devices: int,
    *,
    sharing: int = 1,
    ghost_batch: int | None = None,
    accumulate: int = 1,
    keep: str = "first",
    only: Only = None,
) -> AnyModule:
    """Makes torch's batch norms in ``module`` normalize as several devices would, in place.

    Args:
        module: a model, or a batch norm itself.
        devices: how many.
        sharing: consecutive devices that share statistics; it divides ``devices``. 1 is per-device batch norm.
        ghost_batch: samples of a device that share statistics, if fewer than it holds.
        accumulate: global batches in one batch, accumulated for one optimizer step.
        keep: whose running statistics: "first", those of the first device (or its group), as DistributedDataParallel
            has them; "each", those of every device, until :meth:`Simulated.pool` pools them.
        only: which layers, as for :func:`syncbn.convert`.

    Returns:
        The same object; :func:`unsimulate` undoes it.

    Raises:
        TypeError: a layer, by name, that is not of torch's class BatchNorm1d, 2d or 3d; batch norm, by name,
            outside any layer (see :func:`syncbn.convert`).
        ValueError: devices that do not divide into such groups; groups of ghost batches.
    """
    if sharing < 1 or devices % sharing or (ghost_batch is not None and sharing != 1):
        raise ValueError(f"devices={devices} sharing={sharing} ghost_batch={ghost_batch}: these do not go together")
    accepts = predicate(only)
    refuse_hidden(module, accepts)
    chosen = [(name, layer) for name, layer in batch_norms(module, accepts) if not isinstance(layer, Simulated)]
    for name, layer in chosen:
        if type(layer) not in _TWINS:
            raise TypeError(f"{name or 'the module'} is a {type(layer).__qualname__}: simulated are torch's own alone")
    for _, layer in chosen:
        layer.__class__ = _TWINS[type(layer)]
        running = running_statistics.of_layer(layer) if keep == "each" else None
        rows = None if running is None else tuple(each.repeat(devices, 1) for each in running)
        values = (devices, sharing, ghost_batch, accumulate, rows)
        layer.__dict__ |= dict(zip(_OPTIONS, values, strict=True))
    return module


def unsimulate(module: AnyModule) -> AnyModule:
    """Turns the layers of ``module`` back into torch's, in place; per-device running statistics are dropped."""
    for layer in module.modules():
        if type(layer) in _ORIGINALS:
            layer.__class__ = _ORIGINALS[type(layer)]
            for option in _OPTIONS:
                del layer.__dict__[option]
    return module
