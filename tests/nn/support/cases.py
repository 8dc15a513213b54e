"""A training of the layer, as hypothesis draws it: sizes, types, options, and a seed that all numbers follow from."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import syncbn

LAYERS = {2: syncbn.SyncBatchNorm1d, 3: syncbn.SyncBatchNorm1d, 4: syncbn.SyncBatchNorm2d, 5: syncbn.SyncBatchNorm3d}
LONGEST = {2: 0, 3: 12, 4: 7, 5: 4}  # of a spatial dimension, by the number of dimensions
LARGE = {2: (), 3: (1025,), 4: (33, 31), 5: (5, 11, 17)}
# What torch's layers take, and what somebody gets who converts a model to half precision or feeds it float64.
PARAMETERS = {
    torch.float32: [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16],
    torch.float64: [torch.float64, torch.float64, torch.float32],
    torch.bfloat16: [torch.float32, torch.bfloat16],
    torch.float16: [torch.float32, torch.float16],
}


@dataclass(frozen=True)
class Case:
    """One training, on ``len(samples)`` ranks.

    Lengths in standard deviations: ``offset`` from zero to a channel's mean, ``shift`` from one rank's mean to the
    next's. Channels have scales from ``10 ** -span`` to ``10 ** span``; with ``constant`` the first does not vary.
    """

    samples: tuple[int, ...]  # a rank
    spatial: tuple[tuple[int, ...], ...]  # a rank
    frozen: tuple[bool, ...]  # a rank: its input needs no gradient
    channels: int = 3
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    affine: bool = True
    bias: bool = True
    track: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    biased: bool = False
    autocast: bool = False
    mask: str | None = None
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    offset: float = 0.0
    shift: float = 0.0
    span: int = 0
    constant: bool = False
    steps: int = 1
    native: bool = True  # as far as the compiled passes take it
    seed: int = 0


class Piece(NamedTuple):
    """What one rank gets in one step."""

    x: Tensor
    dy: Tensor
    mask: Tensor | None


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    flags = st.booleans()
    rarely = st.sampled_from([False] * 9 + [True])
    sizes = st.integers(1, 7)
    ndim = draw(st.sampled_from([4, 2, 3, 5]))
    samples = draw(
        st.one_of(
            sizes.map(lambda size: [size] * world_size),
            st.lists(sizes, min_size=world_size, max_size=world_size),
            st.lists(st.integers(0, 4), min_size=world_size, max_size=world_size),
            st.just([1] * world_size),
            st.integers(0, world_size - 1).map(lambda rank: [int(rank == r) for r in range(world_size)]),
            st.just([0] * world_size) if draw(rarely) else st.permutations([0] * (world_size - 1) + [5]),
        )
    )
    shapes = st.tuples(*[st.integers(1, LONGEST[ndim])] * (ndim - 2))
    if draw(rarely):
        shapes = st.one_of(shapes, st.just((1,) * (ndim - 2)), st.just(LARGE[ndim]))
    spatial = draw(
        st.one_of(
            shapes.map(lambda shape: [shape] * world_size),
            st.lists(shapes, min_size=world_size, max_size=world_size),
        )
    )
    dtype = draw(st.sampled_from(list(PARAMETERS)))
    parameters = draw(st.sampled_from(PARAMETERS[dtype]))
    half = {dtype, parameters} & {torch.bfloat16, torch.float16}
    layouts = ["contiguous", "channels_last", "transposed", "sliced"]
    shift = draw(st.sampled_from([0.0, 1.0, 30.0]))
    # Float16 ends at 65504, which the variance of ranks 30 standard deviations of 10 apart is beyond.
    spans = [0, 3] if torch.float16 not in half else [0, 1] if shift < 30 else [0]
    return Case(
        samples=tuple(samples),
        spatial=tuple(spatial),
        channels=draw(st.sampled_from([3, 1, 5, 17, 33, 67, 2, 4, 16, 64]) | st.integers(1, 70)),
        dtype=dtype,
        parameters=parameters,
        affine=draw(st.sampled_from([True, True, True, False])),
        bias=draw(st.sampled_from([True, True, True, False])),
        track=draw(st.sampled_from([True, True, True, False])),
        momentum=draw(st.sampled_from([0.1, None, 0.0, 1.0, 0.3])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        biased=draw(flags),
        autocast=draw(flags),
        mask=draw(st.sampled_from([None, None, None, "values", "samples"])),
        x_layout=draw(st.sampled_from(layouts)),
        dy_layout=draw(st.sampled_from([*layouts, "expanded"])),
        # Float16 ends at 65504; and values of 8 or 11 bits do not vary at 1e4 standard deviations.
        offset=draw(st.sampled_from([0.0, 1.0, 100.0] if half else [0.0, 1.0, 100.0, 1e4])),
        shift=shift,
        span=draw(st.sampled_from(spans)),
        constant=draw(rarely),
        frozen=tuple(draw(st.lists(rarely, min_size=world_size, max_size=world_size))),
        steps=draw(st.integers(1, 3)),
        native=draw(st.sampled_from([True, True, False])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def make_layer(case: Case) -> torch.nn.Module:
    """The layer, on each rank the same, with a state that is not the neutral one."""
    layer = LAYERS[2 + len(case.spatial[0])](
        case.channels, case.eps, case.momentum, case.affine, case.track,
        biased_running_var=case.biased, dtype=case.parameters,
    )  # fmt: skip
    drop_bias(layer, case)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if name != "num_batches_tracked":
                value.copy_(torch.rand(case.channels, generator=generator) + 0.5)
    return layer


def drop_bias(layer: torch.nn.Module, case: Case) -> None:
    """As the keyword bias=False does, which torch has from 2.13 on."""
    if not case.bias:
        layer.bias = None


def make_piece(case: Case, step: int, rank: int) -> Piece:
    """The values are rounded to ``dtype`` here, once: what is measured later is the layer's rounding alone."""
    generator = torch.Generator().manual_seed(case.seed)  # alike on all ranks

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    per_channel = (1, case.channels, *[1] * len(case.spatial[rank]))
    scale = 10 ** (case.span * (2 * random(*per_channel) - 1))
    mean = case.offset * (0.5 + random(*per_channel) / 2) * torch.where(random(*per_channel) < 0.5, -1, 1)

    generator.manual_seed((case.seed * 8 + step) * 8 + rank)
    shape = (case.samples[rank], case.channels, *case.spatial[rank])
    x = scale * (mean + case.shift * rank + torch.randn(shape, generator=generator, dtype=torch.float64))
    if case.constant:
        x[:, 0] = (scale * mean).flatten()[0]
    if case.dy_layout == "expanded":  # as sum() gives it
        dy = torch.randn(per_channel, generator=generator, dtype=torch.float64).to(case.dtype).expand(shape)
    else:
        dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
    x, mask = x.to(case.dtype), None
    if case.mask is not None:
        keep = (0.0, 0.3, 0.8, 0.8)[int(random(1) * 4)]
        size = [case.samples[rank], *case.spatial[rank]]
        mask = random(*(size if case.mask == "values" else [size[0], *[1] * len(size[1:])])) < keep
        x, dy = (t.masked_fill(~mask.unsqueeze(1), math.nan) for t in (x, dy))
    return Piece(lay_out(x, case.x_layout), lay_out(dy, case.dy_layout), mask)


def lay_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]
    return t
