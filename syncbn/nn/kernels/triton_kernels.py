"""The Triton kernels of :mod:`syncbn.nn.kernels.gpu`, which documents them; imported when a GPU first needs one.

All treat a tensor as a matrix: ``outer`` rows, ``stride`` values apart. With ``ROWS`` a row is one position, its
columns are the channels. Without, it is one sample, a channel's ``positions`` side by side, and no tile has columns of
two channels. A program processes one range of columns, in tiles of ``A`` rows and ``B`` columns below each other, every
``num_programs(1)``-th one, and loads ``STAGES`` of them ahead.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(positions, channels, B: tl.constexpr, ROWS: tl.constexpr):
    """This program's first channel, the offset of its columns in that channel, and the number of columns left there."""
    program = tl.program_id(0).to(tl.int64)
    if ROWS:
        channel = program * B
        begin = program * 0
        left = channels - channel
    else:
        blocks = tl.cdiv(positions, B)
        channel = program // blocks
        begin = (program - channel * blocks) * B
        left = positions - begin
    return channel, begin, left


@triton.jit
def _tile(t, outer, positions, stride, channel, begin, left, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of tile ``t`` from the start of the tensor, and a mask of those within the tensor."""
    row = t * A + tl.arange(0, A).to(tl.int64)
    column = tl.arange(0, B)
    first = channel if ROWS else channel * positions + begin
    within = (row < outer)[:, None] & (column < left)[None, :]
    return row[:, None] * stride + (first + column)[None, :], within


@triton.jit
def _values(pointer, channel, left, B: tl.constexpr, ROWS: tl.constexpr):
    """Per-channel values for the columns: shape ``(1, B)``, or ``(1, 1)`` if all columns belong to one channel."""
    if ROWS:
        column = tl.arange(0, B)
        values = tl.load(pointer + channel + column, mask=column < left, other=0)[None, :]
    else:
        values = tl.load(pointer + channel + tl.arange(0, 1))[None, :]
    return values


@triton.jit
def _over_lanes(values, ROWS: tl.constexpr):
    """The sum for each channel: shape ``(1, B)``, or ``(1, 1)`` if all columns belong to one."""
    if ROWS:
        total = tl.sum(values, 0, keep_dims=True)
    else:
        total = tl.sum(tl.sum(values, 1, keep_dims=True), 0, keep_dims=True)
    return total


@triton.jit
def _store_pair(out, rounded, first, second, place, channel, left, channels, B: tl.constexpr, ROWS: tl.constexpr):
    """Writes both per channel, the second ``channels`` behind the first; and once more in float32, if asked."""
    if ROWS:
        column = tl.arange(0, B)[None, :]
        within = column < left
        at = channel + column
    else:
        within = tl.full((1, 1), True, tl.int1)
        at = channel + tl.arange(0, 1)[None, :]
    tl.store(out + place * 2 * channels + at, first, mask=within)
    tl.store(out + place * 2 * channels + channels + at, second, mask=within)
    if rounded is not None:
        tl.store(rounded + at, first, mask=within)
        tl.store(rounded + channels + at, second, mask=within)


@triton.jit
def _place(begin, B: tl.constexpr):
    """The index of this program's partial sums among those of its channels."""
    return (begin // B) * tl.num_programs(1) + tl.program_id(1)


@triton.jit(do_not_specialize=["count"])
def sums(
    x, out, number, count, outer, positions, channels, stride, bits_stride,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds up values and their squares, as distances from the first value that a lane sees, in float32.

    A value is at most ``sqrt(k)`` standard deviations from the mean of the ``k`` that a lane sees, itself among them.
    This bounds the cancellation for any offset (shifting by one of the data: Chan, Golub & LeVeque 1983).
    Lanes are merged about their common mean, and only then does the offset come in, in float64.
    """
    channel, begin, left = _columns(positions, channels, B, ROWS)
    tiles = tl.cdiv(outer, A)
    step = tl.num_programs(1)
    at, within = _tile(tl.program_id(1), outer, positions, stride, channel, begin, left, A, B, ROWS)
    shift = tl.load(x + at, mask=within, other=0).to(tl.float32)
    row = tl.arange(0, A).to(tl.int64)
    seen = tl.zeros((A,), tl.int32)  # a lane's count; all columns but those outside have the same
    seen += tl.where(tl.program_id(1) * A + row < outer, 1, 0)
    total = tl.zeros((A, B), tl.float32)
    square = tl.zeros((A, B), tl.float32)
    for t in tl.range(tl.program_id(1) + step, tiles, step, num_stages=STAGES):
        at, within = _tile(t, outer, positions, stride, channel, begin, left, A, B, ROWS)
        far = tl.where(within, tl.load(x + at, mask=within, other=0).to(tl.float32) - shift, 0)
        total += far
        square += far * far
        seen += tl.where(t * A + row < outer, 1, 0)
    n = tl.sum(seen, 0).to(tl.int64)
    if not ROWS:
        n *= tl.minimum(left, B)
    weight = seen.to(tl.float32)[:, None] * tl.where(tl.arange(0, B) < left, 1.0, 0.0)[None, :]
    # A number near the mean is enough: ``rest`` corrects it.
    mean = _over_lanes(weight * shift + total, ROWS) / n.to(tl.float32)
    far = shift - mean
    rest = _over_lanes(weight * far + total, ROWS).to(tl.float64)
    about = _over_lanes(square + far * (2 * total + weight * far), ROWS).to(tl.float64)
    mean = mean.to(tl.float64)
    whole = n.to(tl.float64) * mean + rest
    _store_pair(out, None, whole, about + mean * (rest + whole), _place(begin, B), channel, left, channels, B, ROWS)
    if number is not None:
        tl.store(number, count.to(tl.float64), mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["count", "parts"])
def merge(partial, out, number, rounded, count, parts, width, A: tl.constexpr, B: tl.constexpr):
    """Adds up ``parts`` rows of ``width`` partial sums, in float64 and always in the same order."""
    column = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros((A, B), tl.float64)
    for first in range(0, parts, A):
        row = first + tl.arange(0, A)
        within = (row < parts)[:, None] & (column < width)[None, :]
        total += tl.load(partial + row[:, None].to(tl.int64) * width + column[None, :], mask=within, other=0)
    both = tl.sum(total, 0)
    tl.store(out + column, both, mask=column < width)
    if rounded is not None:
        tl.store(rounded + column, both, mask=column < width)
    if number is not None:
        tl.store(number, count.to(tl.float64), mask=tl.program_id(0) == 0)


@triton.jit
def _unpack(sums, out, channel, channels, within):
    """Count, mean and biased variance, in float64; writes them as :func:`statistics` does.

    An empty set has mean 0 and variance 0, and a NaN stays one.
    """
    n = tl.load(sums)
    divisor = tl.where(n > 0, n, 1)
    mean = tl.load(sums + 1 + channel, mask=within, other=0) / divisor
    var = tl.load(sums + 1 + channels + channel, mask=within, other=0) / divisor - mean * mean
    var = tl.where(var < 0, 0, var)
    rounded = mean.to(tl.float32)
    tl.store(out + channel, rounded, mask=within)
    tl.store(out + channels + channel, var, mask=within)
    tl.store(out + 2 * channels + channel, mean - rounded.to(tl.float64), mask=within)
    return n, mean, var


@triton.jit
def statistics(sums, out, channels, B: tl.constexpr):
    """Mean, biased variance, and what the mean lost in rounding: float32, shape ``(3, channels)``."""
    channel = tl.program_id(0) * B + tl.arange(0, B)
    _unpack(sums, out, channel, channels, channel < channels)


@triton.jit
def update_running(
    sums, out, running_mean, running_var, tracked, momentum, and_rest, channels,
    BIASED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """As :func:`statistics`; and ``running += momentum * (batch - running)`` in float64.

    n = 0 moves nothing, n = 1 not the variance. The momentum is passed in two parts, for the digits of float64.
    """
    share = tl.full((), 0, tl.float64) + momentum + and_rest
    channel = tl.program_id(0) * B + tl.arange(0, B)
    within = channel < channels
    n, mean, var = _unpack(sums, out, channel, channels, within)
    if not BIASED:
        var = var * (n / tl.where(n > 2, n - 1, 1))
    was = tl.load(running_mean + channel, mask=within, other=0).to(tl.float64)
    tl.store(running_mean + channel, was + tl.where(n >= 1, share, 0) * (mean - was), mask=within)
    was = tl.load(running_var + channel, mask=within, other=0).to(tl.float64)
    tl.store(running_var + channel, was + tl.where(n >= 2, share, 0) * (var - was), mask=within)
    if tracked is not None:
        first = tl.program_id(0) == 0
        tl.store(tracked, tl.load(tracked, mask=first) + tl.where(n > 0, 1, 0), mask=first)


@triton.jit
def _factors(var, rest, weight, bias, eps, channel, left, B: tl.constexpr, ROWS: tl.constexpr):
    """``1 / sqrt(var + eps)``, and scale and offset with which ``(x - mean) * scale + offset`` is the batch norm.

    The offset corrects the rounding of the mean: so the difference is right for any mean, and the kernel keeps one
    value less per channel.
    """
    invstd = tl.rsqrt(_values(var, channel, left, B, ROWS) + eps)
    scale = invstd
    if weight is not None:
        scale = invstd * _values(weight, channel, left, B, ROWS).to(tl.float32)
    lost = _values(rest, channel, left, B, ROWS)
    if bias is None:
        offset = -scale * lost
    else:
        offset = tl.fma(-scale, lost, _values(bias, channel, left, B, ROWS).to(tl.float32))
    return invstd, scale, offset


@triton.jit
def _affine(far, scale, offset, A: tl.constexpr, B: tl.constexpr):
    """The same instruction forward and backward: the ReLU's gradient needs the same sign as its output."""
    return tl.fma(far, tl.broadcast_to(scale, (A, B)), tl.broadcast_to(offset, (A, B)))


@triton.jit
def _byte(t, outer, positions, bits_stride, channel, begin, left, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of the bytes that have a bit for each value of tile ``t``, and a mask of those that exist."""
    row = t * A + tl.arange(0, A).to(tl.int64)
    column = tl.arange(0, B // 8)
    first = channel // 8 if ROWS else channel * tl.cdiv(positions, 8) + begin // 8
    within = (row < outer)[:, None] & (column * 8 < left)[None, :]
    return row[:, None] * bits_stride + (first + column)[None, :], within


@triton.jit
def normalize(
    x, residual, y, bits, mean, var, rest, weight, bias, eps, outer, positions, channels, stride, bits_stride,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, plus the residual, through the ReLU; rounded once."""
    channel, begin, left = _columns(positions, channels, B, ROWS)
    center = _values(mean, channel, left, B, ROWS)
    _, scale, offset = _factors(var, rest, weight, bias, eps, channel, left, B, ROWS)
    for t in tl.range(tl.program_id(1), tl.cdiv(outer, A), tl.num_programs(1), num_stages=STAGES):
        at, within = _tile(t, outer, positions, stride, channel, begin, left, A, B, ROWS)
        z = _affine(tl.load(x + at, mask=within, other=0).to(tl.float32) - center, scale, offset, A, B)
        if residual is not None:
            z += tl.load(residual + at, mask=within, other=0).to(tl.float32)
        if RELU:
            closed = z <= 0  # a NaN passes
            z = tl.where(closed, 0, z)
            if bits is not None:
                passed = tl.where(closed, 0, 1).reshape(A, B // 8, 8)
                byte = tl.sum(passed << tl.arange(0, 8)[None, None, :], 2)
                at_byte, some = _byte(t, outer, positions, bits_stride, channel, begin, left, A, B, ROWS)
                tl.store(bits + at_byte, byte.to(tl.uint8), mask=some)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=within)


@triton.jit
def _gradient(
    dy, bits, far, scale, offset, at, within, t, outer, positions, bits_stride, channel, begin, left,
    RELU: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of ``dy``, propagated back through the ReLU."""
    gradient = tl.load(dy + at, mask=within, other=0).to(tl.float32)
    if RELU:
        if bits is None:
            gradient = tl.where(_affine(far, scale, offset, A, B) <= 0, 0, gradient)
        else:
            at_byte, some = _byte(t, outer, positions, bits_stride, channel, begin, left, A, B, ROWS)
            byte = tl.load(bits + at_byte, mask=some, other=0).to(tl.int32)
            passed = (tl.broadcast_to(byte[:, :, None], (A, B // 8, 8)) >> tl.arange(0, 8)[None, None, :]) & 1
            gradient = tl.where(passed.reshape(A, B) == 0, 0, gradient)
    return gradient


@triton.jit
def gradient_sums(
    dy, x, bits, mean, var, rest, weight, bias, out, rounded, eps, outer, positions, channels, stride, bits_stride,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Adds up ``dy`` and ``dy * xhat``."""
    channel, begin, left = _columns(positions, channels, B, ROWS)
    center = _values(mean, channel, left, B, ROWS)
    invstd, scale, offset = _factors(var, rest, weight, bias, eps, channel, left, B, ROWS)
    total = tl.zeros((A, B), tl.float32)
    weighted = tl.zeros((A, B), tl.float32)
    for t in tl.range(tl.program_id(1), tl.cdiv(outer, A), tl.num_programs(1), num_stages=STAGES):
        at, within = _tile(t, outer, positions, stride, channel, begin, left, A, B, ROWS)
        far = tl.load(x + at, mask=within, other=0).to(tl.float32) - center
        gradient = _gradient(
            dy, bits, far, scale, offset, at, within, t, outer, positions, bits_stride, channel, begin, left,
            RELU, A, B, ROWS,
        )  # fmt: skip
        total += gradient
        weighted += gradient * far
    total = _over_lanes(total, ROWS).to(tl.float64)
    weighted = _over_lanes(weighted, ROWS).to(tl.float64) - total * _values(rest, channel, left, B, ROWS)
    weighted *= invstd
    _store_pair(out, rounded, total, weighted, _place(begin, B), channel, left, channels, B, ROWS)


@triton.jit
def input_gradient(
    dy, x, bits, dx, dresidual, mean, var, rest, weight, bias, n, sums, eps,
    outer, positions, channels, stride, bits_stride,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``dx = scale * (dy - sum(dy)/n - xhat * sum(dy*xhat)/n)``; and ``dy`` propagated back through the ReLU."""
    channel, begin, left = _columns(positions, channels, B, ROWS)
    center = _values(mean, channel, left, B, ROWS)
    invstd, scale, offset = _factors(var, rest, weight, bias, eps, channel, left, B, ROWS)
    share = -scale / tl.load(n).to(tl.float32)
    even = share * _values(sums, channel, left, B, ROWS).to(tl.float32)
    slope = share * invstd * _values(sums + channels, channel, left, B, ROWS).to(tl.float32)
    even -= slope * _values(rest, channel, left, B, ROWS)
    for t in tl.range(tl.program_id(1), tl.cdiv(outer, A), tl.num_programs(1), num_stages=STAGES):
        at, within = _tile(t, outer, positions, stride, channel, begin, left, A, B, ROWS)
        far = tl.load(x + at, mask=within, other=0).to(tl.float32) - center
        gradient = _gradient(
            dy, bits, far, scale, offset, at, within, t, outer, positions, bits_stride, channel, begin, left,
            RELU, A, B, ROWS,
        )  # fmt: skip
        tl.store(dx + at, (gradient * scale + (far * slope + even)).to(dx.dtype.element_ty), mask=within)
        if dresidual is not None:
            tl.store(dresidual + at, gradient.to(dresidual.dtype.element_ty), mask=within)
