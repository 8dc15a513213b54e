"""How far rounding may take the layer from one process in float64, and not a step further.

Each bound is a unit times the sizes of the terms that are added up, not of what is left when they cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.nn.support.cases import Case, drop_bias, make_layer

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
# By the type that computes: float32 for half precision too.
# Of the size of the terms: some roundings each, and sums over thousands of them, in an order that the cut decides.
TERMS = {torch.float64: 1e-11, torch.float32: 1e-5}
# Of the size of the mean, for any type: a mean has float64's digits, since the sums that ranks exchange do.
MEAN = 4 * EPS[torch.float64]
RUNNING = ("running_mean", "running_var")


class Near(NamedTuple):
    """A value, and how far from it is still rounding."""

    value: Tensor
    bound: Tensor


class OneProcess:
    """Torch's own batch norm in float64, fed with what all ranks hold: ``(n, C)``, since a pixel is a sample to it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.twin = nn.BatchNorm1d(case.channels, case.eps, case.momentum, case.affine, case.track, dtype=torch.float64)
        drop_bias(self.twin, case)
        self.twin.load_state_dict(make_layer(case).state_dict())
        self.bounds = {name: torch.zeros(case.channels, dtype=torch.float64) for name in RUNNING}

    def step(self, x: Tensor, dy: Tensor) -> dict[str, Near]:
        """``y``, ``dx``, ``dgamma`` and ``dbeta``; moves the running statistics. Nothing comes of no values."""
        twin = self.twin
        if len(x) == 0:
            like = {"y": x, "dx": x, "dgamma": twin.weight, "dbeta": twin.bias}
            return {name: Near(torch.zeros_like(t), torch.zeros_like(t)) for name, t in like.items() if t is not None}
        mean = x.mean(0)
        x = (x - mean).requires_grad_()  # torch's sums lose digits to the mean, in float64 too
        twin.zero_grad()
        before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
        y = twin(x)
        y.backward(dy)
        values = {"y": y.detach(), "dx": x.grad}
        values |= {"dgamma" if name == "weight" else "dbeta": p.grad for name, p in twin.named_parameters()}
        var = x.detach().square().mean(0)
        self._learn(before, len(x), mean, var)
        bounds = self._bounds(values, x.detach(), dy, mean, var)
        return {name: Near(value, bounds[name]) for name, value in values.items()}

    def buffers(self) -> dict[str, Near]:
        exact = torch.zeros(())  # the count of batches
        return {name: Near(value, self.bounds.get(name, exact)) for name, value in self.twin.named_buffers()}

    def _learn(self, before: dict[str, Tensor], n: int, mean: Tensor, var: Tensor) -> None:
        """Finishes what torch's layer began: puts back the mean, keeps the variance biased, and bounds both."""
        case, twin = self.case, self.twin
        if not case.track:
            return
        share = 1 / twin.num_batches_tracked.item() if case.momentum is None else case.momentum
        twin.running_mean += share * mean
        if case.biased:
            twin.running_var -= share * var / (n - 1)
        for name, batch, bound in zip(RUNNING, (mean, var), self._moments_bounds(mean, var), strict=True):
            terms = (1 - share) * before[name].abs() + share * batch.abs()
            moved = share * bound * n / (n - 1) + 2 * EPS[computing(case.parameters)] * terms
            self.bounds[name] *= 1 - share
            self.bounds[name] += moved + rounding(getattr(twin, name), case.parameters)

    def _moments_bounds(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What the batch's mean and variance may be off by."""
        unit = TERMS[computing(self.case.dtype)]
        return unit * var.sqrt() + MEAN * mean.abs(), unit * var + MEAN * mean.square()

    def _bounds(self, values: dict[str, Tensor], x: Tensor, dy: Tensor, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        case, twin = self.case, self.twin
        unit = TERMS[computing(case.dtype)]
        if case.dy_layout == "expanded":  # equal values: the roundings of their sum all have one sign
            unit *= 10
        gamma, beta = (None if p is None else p.detach().abs() for p in (twin.weight, twin.bias))
        gamma, beta = 1 if gamma is None else gamma, 0 if beta is None else beta
        invstd = (var + case.eps).rsqrt()
        off = unit + self._moments_bounds(mean, var)[1] * invstd.square()  # of a term, relative
        off_xhat = (unit * var.sqrt() + MEAN * mean.abs()) * invstd  # absolute
        xhat, dy = (x * invstd).abs(), dy.abs()
        dy_xhat = dy * xhat
        dx = dy + dy.mean(0) + xhat * dy_xhat.mean(0)
        dx_off = off * dx + off_xhat * (dy_xhat.mean(0) + xhat * dy.mean(0))
        return {
            "y": gamma * (off * xhat + off_xhat) + unit * beta + rounding(values["y"], case.dtype),
            "dx": gamma * invstd * dx_off + rounding(values["dx"], case.dtype),
            # The sum of what each rank has rounded.
            "dgamma": off * dy_xhat.sum(0) + off_xhat * dy.sum(0) + rounding(dy_xhat.sum(0), case.parameters),
            "dbeta": unit * dy.sum(0) + rounding(dy.sum(0), case.parameters),
        }


def computing(dtype: torch.dtype) -> torch.dtype:
    """The type in which the layer handles numbers of this one."""
    return torch.promote_types(dtype, torch.float32)


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place, at most; near zero half of the smallest number that there is."""
    info = torch.finfo(dtype)
    return (value.abs() + info.smallest_normal) * info.eps / 2


def worst(actual: Tensor, near: Near) -> float:
    """The largest distance, in bounds: up to 1 it is rounding. Infinite where a number is none."""
    if not actual.isfinite().all():
        return float("inf")
    if not actual.numel():
        return 0.0
    return float(((actual - near.value).abs() / near.bound).nan_to_num(0.0).max())


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """What counts, in float64: ``(n, C)``."""
    rows = values.detach().double().movedim(1, -1)
    return rows.flatten(0, -2) if mask is None else rows[mask.expand(rows.shape[:-1])]
