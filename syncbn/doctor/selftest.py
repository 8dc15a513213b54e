"""The layer on this machine's own ranks, held to one process in float64; and how long a message takes.

Ranks are processes that are started for it, watched, and killed at the end, whatever became of them.
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
from syncbn.doctor.rows import Row, Status, failed, ok, warning
from syncbn.doctor.selftest_ranks import Plan, RankError, Say
from syncbn.testing import force_exchange

CHANNELS, SAMPLES, IMAGE = 64, 16, (8, 8)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # docs/layer.md
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
MESSAGES, WARM_UP = 200, 20
SLOW = 10_000.0  # µs
RESNET50 = 2 * 53  # messages of a step: a layer's forward and backward


class Case(NamedTuple):
    """One step of training: how many samples each rank holds, in which type."""

    name: str
    shares: tuple[int, ...]
    dtype: torch.dtype


class Result(NamedTuple):
    """What a rank gives back: the tensors of each case by name, and µs of each message."""

    cases: list[dict[str, Tensor]]
    messages: list[float]


Exercise = Callable[[int, Plan, Say], Result]


def plans() -> list[Plan]:
    """Two ranks on GPUs where there are two; else two on the CPU, and the GPU by itself if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() and dist.is_nccl_available() else 0
    if count >= 2:
        return [Plan("cuda", "nccl", 2)]
    return [Plan("cpu", "gloo", 2), *[Plan("cuda", "nccl", 1)] * count]


def cases(plan: Plan) -> list[Case]:
    """The steps to take."""
    uneven, empty = ((11, 5), (SAMPLES, 0)) if plan.ranks == 2 else ((SAMPLES,), None)
    found = [Case("float32", uneven, torch.float32), Case("float64", uneven, torch.float64)]
    if empty is not None:
        found.insert(1, Case("float32, an empty rank", empty, torch.float32))
    return found


def exercise(rank: int, plan: Plan, say: Say) -> Result:
    """What each rank does: the layer forward and backward, case by case, then messages against the clock."""
    tensors = []
    for case in cases(plan):
        say(f"the layer, {case.name}")
        tensors.append(_step(rank, plan, case))
    say("messages")
    return Result(tensors, list(_messages(plan)) if plan.ranks > 1 else [])


def run(timeout: float = 120.0, exercise: Exercise = exercise) -> list[Row]:
    """Rows on the layer and its messages; a rank that raises, dies or hangs is a row FAILED.

    Args:
        timeout: seconds for all of it.
        exercise: what each rank does; a function of a module.
    """
    rows, end = [], time.monotonic() + timeout
    for plan in plans():
        try:
            results = selftest_ranks.on_ranks(plan, exercise, max(end - time.monotonic(), 0.0))
        except RankError as failure:
            rows.append(failed(f"layer on {plan.where}", f"{plan}: {failure}", failure.fix))
            continue
        except OSError as error:
            found = f"{plan}: ranks cannot be started: {error}"
            rows.append(failed(f"layer on {plan.where}", found, "see TMPDIR, and ulimit -u"))
            continue
        for number, case in enumerate(cases(plan)):
            rows.append(judge(plan, case, [result.cases[number] for result in results]))
        if results[0].messages:
            rows.append(latency(plan, results[0].messages))
    return rows


def judge(plan: Plan, case: Case, ranks: list[dict[str, Tensor]]) -> Row:
    """The greatest error of each tensor, over the tensor's greatest value, and whether buffers are bitwise equal."""
    expected = _one_process(case)
    actual = {name: torch.cat([tensors[name] for tensors in ranks]) for name in ("y", "dx")}
    actual |= {name: sum((t[name].double() for t in ranks), torch.zeros(())) for name in ("dweight", "dbias")}
    actual |= {name: ranks[0][name] for name in RUNNING}
    errors = {name: _error(actual[name], expected[name]) for name in expected}
    apart = [name for name in RUNNING if not all(torch.equal(ranks[0][name], other[name]) for other in ranks)]
    tolerance = TOLERANCE[case.dtype]
    listed = ", ".join(f"{name} {error:.0e}" for name, error in errors.items() if name != "num_batches_tracked")
    found = f"{plan}, {' + '.join(map(str, case.shares))} samples; relative errors: {listed}"
    wrong = [name for name, error in errors.items() if not error <= tolerance]
    fix, status = "", Status.ok
    if apart:
        found += f"; {', '.join(apart)}: not the same on all ranks"
    elif plan.ranks > 1:
        found += "; buffers bitwise equal"
    if wrong or apart:
        status = Status.failed
        what = f"{', '.join(wrong)} off by more than {tolerance:g}; " if wrong else ""
        native = "see whether SYNCBN_NATIVE=0 mends it; " if plan.device == "cpu" else ""
        fix = f"{what}{native}do not train with this: report it, with the output of syncbn doctor --json"
    return Row(f"layer on {plan.where}, {case.name}", found, status, fix, errors | {"tolerance": tolerance})


def latency(plan: Plan, microseconds: list[float]) -> Row:
    """Median and quartiles of one message."""
    low, median, high = statistics.quantiles(microseconds, n=4, method="inclusive")
    found = (
        f"{plan}: median {median:,.0f} µs, quartiles {low:,.0f} to {high:,.0f}, of {len(microseconds)} all-reduces of "
        f"{2 * CHANNELS + 1} float64 numbers; a ResNet-50 makes {RESNET50} a step: {RESNET50 * median / 1e3:,.0f} ms"
    )
    figures = {"median_us": median, "lower_quartile_us": low, "upper_quartile_us": high}
    row = ok(f"message on {plan.where}", found)
    if median > SLOW:
        row = warning(row.check, found, "see that no other work fills the cores, and that each rank has one")
    return Row(row.check, row.found, row.status, row.fix, figures)


def _batch(case: Case) -> tuple[Tensor, Tensor]:
    """The whole input and gradient of the output; channels differ in mean and scale, and so do samples."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, SAMPLES, CHANNELS, *IMAGE, generator=generator, dtype=torch.float64)
    scale = torch.linspace(1, 3, CHANNELS, dtype=torch.float64).view(-1, 1, 1)
    of_sample = torch.linspace(0, 1, SAMPLES, dtype=torch.float64).view(-1, 1, 1, 1)
    return (x * scale + scale + of_sample).to(case.dtype), dy.to(case.dtype)


def _with_parameters(layer: nn.Module, dtype: torch.dtype) -> None:
    """Sets a weight and a bias that are not the neutral ones, and that ``dtype`` can hold."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS, dtype=dtype))  # type: ignore[operator]
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS, dtype=dtype))  # type: ignore[operator]


def _outcome(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = {"y": y, "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    found |= {name: getattr(layer, name) for name in RUNNING}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _one_process(case: Case) -> dict[str, Tensor]:
    """What is right: torch's own layer, the whole batch, float64."""
    layer = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    _with_parameters(layer, case.dtype)
    x, dy = _batch(case)
    return _outcome(layer, x.double(), dy.double())


def _step(rank: int, plan: Plan, case: Case) -> dict[str, Tensor]:
    """This rank's share; a rank by itself exchanges with itself."""
    device = plan.device_of(rank)
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=case.dtype, device=device)
    _with_parameters(layer, case.dtype)
    x, dy = (whole.split(case.shares)[rank].to(device) for whole in _batch(case))
    with force_exchange():
        return _outcome(layer, x, dy)


def _messages(plan: Plan) -> Iterator[float]:
    wait: Callable[[], None] = torch.cuda.synchronize if plan.device == "cuda" else lambda: None
    message = torch.ones(2 * CHANNELS + 1, dtype=torch.float64, device=plan.device_of(dist.get_rank()))
    for number in range(WARM_UP + MESSAGES):
        wait()
        start = time.perf_counter()
        dist.all_reduce(message)
        wait()
        if number >= WARM_UP:
            yield 1e6 * (time.perf_counter() - start)
        message.fill_(1)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Infinite where a number is none, or where shapes differ."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    return float((actual.double() - expected).abs().max() / expected.abs().max())
