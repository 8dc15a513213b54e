"""Self-test of the layer on ranks of this machine, compared with one process in float64; also times an all-reduce.

The ranks are processes that are started for the test, monitored, and killed at the end in any case.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.doctor import selftest_ranks
from syncbn.doctor.rows import Row, Status, failed
from syncbn.doctor.selftest_ranks import Place, RankError, ReportStage
from syncbn.nn.comm import all_reduce, channels, groups
from syncbn.testing import force_exchange

CHANNELS, SAMPLES, IMAGE = 64, 16, (8, 8)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # docs/concepts/arithmetic.md
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
ALL_REDUCES, WARM_UP = 200, 20
SLOW = 10_000.0  # µs
RESNET50 = 2 * 53  # all-reduces in a training step: one in forward and one in backward for each of its 53 layers


class Case(NamedTuple):
    """One training step: the number of samples on each rank, and their type."""

    name: str
    shares: tuple[int, ...]
    dtype: torch.dtype


class Result(NamedTuple):
    """Result of a rank: the tensors of each case by name, the duration of each all-reduce in µs, and its medium."""

    cases: list[dict[str, Tensor]]
    all_reduces: list[float]
    medium: str = ""


Exercise = Callable[[int, Place, ReportStage], Result]


def places() -> list[Place]:
    """Two ranks on GPUs if there are two GPUs; otherwise two ranks on the CPU, and one on the GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() and dist.is_nccl_available() else 0
    if count >= 2:
        return [Place("cuda", "nccl", 2)]
    return [Place("cpu", "gloo", 2), *[Place("cuda", "nccl", 1)] * count]


def cases(place: Place) -> list[Case]:
    """The training steps of the self-test."""
    uneven, empty = ((11, 5), (SAMPLES, 0)) if place.ranks == 2 else ((SAMPLES,), None)
    found = [Case("float32", uneven, torch.float32), Case("float64", uneven, torch.float64)]
    if empty is not None:
        found.insert(1, Case("float32, an empty rank", empty, torch.float32))
    return found


def exercise(rank: int, place: Place, report_stage: ReportStage) -> Result:
    """The work of each rank: the layer's forward and backward in each case, then timed all-reduces."""
    tensors = []
    for case in cases(place):
        report_stage(f"the layer, {case.name}")
        tensors.append(_step(rank, place, case))
    report_stage("all-reduces")
    if place.ranks == 1:
        return Result(tensors, [])
    group = groups.resolve("world")
    assert group is not None
    medium = channels.medium(group) if place.device == "cpu" else place.backend
    return Result(tensors, list(_time_all_reduces(place, group)), medium)


def run(timeout: float = 120.0, exercise: Exercise = exercise) -> list[Row]:
    """Run the self-test within ``timeout`` seconds; a rank that raises, dies or hangs gives a FAILED row.

    Each rank runs ``exercise``, which must be importable from a module.
    """
    rows, end = [], time.monotonic() + timeout
    for place in places():
        try:
            results = selftest_ranks.on_ranks(place, exercise, max(end - time.monotonic(), 0.0))
        except RankError as failure:
            rows.append(failed(f"layer on {place.where}", f"{place}: {failure}", failure.fix))
            continue
        except OSError as error:
            found = f"{place}: ranks cannot be started: {error}"
            rows.append(failed(f"layer on {place.where}", found, "check TMPDIR, and ulimit -u"))
            continue
        for number, case in enumerate(cases(place)):
            rows.append(compare(place, case, [result.cases[number] for result in results]))
        if results[0].all_reduces:
            rows.append(latency(place, results[0].all_reduces, results[0].medium))
    return rows


def compare(place: Place, case: Case, ranks: list[dict[str, Tensor]]) -> Row:
    """Compare the ranks' tensors with one process, and the buffers of the ranks with each other.

    The error of a tensor is its largest absolute error divided by its largest absolute value. Buffers must be bitwise
    equal on all ranks.
    """
    expected = _one_process(case)
    actual = {name: torch.cat([tensors[name] for tensors in ranks]) for name in ("y", "dx")}
    actual |= {name: sum((t[name].double() for t in ranks), torch.zeros(())) for name in ("dweight", "dbias")}
    actual |= {name: ranks[0][name] for name in RUNNING}
    errors = {name: _error(actual[name], expected[name]) for name in expected}
    unequal = [name for name in RUNNING if not all(torch.equal(ranks[0][name], other[name]) for other in ranks)]
    tolerance = TOLERANCE[case.dtype]
    listed = ", ".join(f"{name} {error:.0e}" for name, error in errors.items() if name != "num_batches_tracked")
    found = f"{place}, {' + '.join(map(str, case.shares))} samples; relative errors: {listed}"
    wrong = [name for name, error in errors.items() if not error <= tolerance]
    fix = ""
    if unequal:
        found += f"; {', '.join(unequal)}: not the same on all ranks"
    elif place.ranks > 1:
        found += "; buffers bitwise equal"
    if wrong or unequal:
        errors_found = f"{', '.join(wrong)} off by more than {tolerance:g}; " if wrong else ""
        native = "check whether SYNCBN_NATIVE=0 helps; " if place.device == "cpu" else ""
        fix = f"{errors_found}{native}do not train with this: report it, with the output of syncbn doctor --json"
    status = Status.failed if fix else Status.ok
    return Row(f"layer on {place.where}, {case.name}", found, status, fix, errors | {"tolerance": tolerance})


def latency(place: Place, microseconds: list[float], medium: str) -> Row:
    """Report the median and the quartiles of the duration of one all-reduce, and what it goes through."""
    low, median, high = statistics.quantiles(microseconds, n=4, method="inclusive")
    found = (
        f"{place.ranks} ranks, {medium}; median {median:,.0f} µs, quartiles {low:,.0f} to {high:,.0f}, of "
        f"{len(microseconds)} all-reduces of {2 * CHANNELS + 1} float64 numbers; a ResNet-50 needs {RESNET50} a step: "
        f"{RESNET50 * median / 1e3:,.0f} ms"
    )
    figures = {"median_us": median, "lower_quartile_us": low, "upper_quartile_us": high}
    fix = "check that no other program uses the cores, and that each rank has one" if median > SLOW else ""
    return Row(f"all-reduce on {place.where}", found, Status.warning if fix else Status.ok, fix, figures)


def _batch(case: Case) -> tuple[Tensor, Tensor]:
    """The input and the gradient of the output for all ranks; channels differ in mean and scale, samples in mean."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, SAMPLES, CHANNELS, *IMAGE, generator=generator, dtype=torch.float64)
    scale = torch.linspace(1, 3, CHANNELS, dtype=torch.float64).view(-1, 1, 1)
    sample_mean = torch.linspace(0, 1, SAMPLES, dtype=torch.float64).view(-1, 1, 1, 1)
    return (x * scale + scale + sample_mean).to(case.dtype), dy.to(case.dtype)


def _set_parameters(layer: nn.Module, dtype: torch.dtype) -> None:
    """Set a weight other than 1 and a bias other than 0, rounded to ``dtype`` so that all layers have the same."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS, dtype=dtype))  # type: ignore[operator]
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS, dtype=dtype))  # type: ignore[operator]


def _forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Run the layer forward and backward, and return output, gradients and buffers by name."""
    x = x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = {"y": y, "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    found |= {name: getattr(layer, name) for name in RUNNING}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _one_process(case: Case) -> dict[str, Tensor]:
    """The reference: torch.nn.BatchNorm2d on the whole batch in float64."""
    layer = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    _set_parameters(layer, case.dtype)
    x, dy = _batch(case)
    return _forward_backward(layer, x.double(), dy.double())


def _step(rank: int, place: Place, case: Case) -> dict[str, Tensor]:
    """Run the synchronized layer on this rank's share of the batch."""
    device = place.device_of(rank)
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=case.dtype, device=device)
    _set_parameters(layer, case.dtype)
    x, dy = (whole.split(case.shares)[rank].to(device) for whole in _batch(case))
    with force_exchange():  # a single rank runs the distributed code too
        return _forward_backward(layer, x, dy)


def _time_all_reduces(place: Place, group: dist.ProcessGroup) -> Iterator[float]:
    """Durations in µs of all-reduces as the layer performs them."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if place.device == "cuda" else lambda: None
    sums = torch.ones(2 * CHANNELS + 1, dtype=torch.float64, device=place.device_of(dist.get_rank()))
    for number in range(WARM_UP + ALL_REDUCES):
        synchronize()
        start = time.perf_counter()
        all_reduce.all_sum(sums, group, "the self-test")
        synchronize()
        if number >= WARM_UP:
            yield 1e6 * (time.perf_counter() - start)
        sums.fill_(1)


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error; infinite if a number is not finite or the shapes differ."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    return float((actual.double() - expected).abs().max() / expected.abs().max())
