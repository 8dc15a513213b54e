"""Learning rates over the steps of a run, value by value against torch's schedulers; and of a run that is resumed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from syncbn.training import Cosine, OneCycle, Steps
from syncbn.training.loggers.csv_logger import read
from syncbn.training.models.lr_schedules import Schedule
from tests.support.refuses import refuses
from tests.training.support.train_command import Run, train

STEPS = ["model=mlp", "scheduler=steps", "scheduler.milestones=[1, 2]", "logger=csv", "trainer.devices=1"]
STEPS += ["++trainer.limit_train_batches=10", "test=false"]
PER_EPOCH, EPOCHS = 7, 6


def rates(run: Run) -> list[str]:
    assert run.code == 0, run.err
    assert run.directory is not None
    return [f"{float(row['lr-SGD/pg1']):.5g}" for row in read(run.directory / "metrics.csv") if row.get("lr-SGD/pg1")]


def test_steps_are_where_they_are_also_for_a_run_that_goes_on(tmp_path: Path) -> None:
    """It stops where the rate is about to change."""
    assert rates(train(tmp_path, *STEPS, "trainer.max_epochs=1", "run.id=a")) == ["0.05"]
    assert rates(train(tmp_path, *STEPS, "trainer.max_epochs=3", "run.id=a")) == ["0.05", "0.005", "0.0005"]


def an_optimizer(kind: type[Optimizer] = SGD) -> Optimizer:
    """Two groups, the second with a tenth of the rate, as with rates of layers."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    more: dict[str, Any] = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(groups, lr=0.4, **more)  # type: ignore[call-arg]
    optimizer.param_groups[1]["lr"] = 0.04
    return optimizer


def per_step(optimizer: Optimizer, scheduler: LRScheduler, *, epochs: int = EPOCHS) -> list[list[Any]]:
    """The rate and the momentum of each group in each step, with ``step()`` called as Lightning calls it."""
    if isinstance(scheduler, Schedule):
        scheduler.steps_per_epoch = lambda: PER_EPOCH
    interval, found = getattr(scheduler, "interval", "epoch"), []
    for number in range(epochs * PER_EPOCH):
        found.append([(g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups])
        optimizer.step()
        if interval == "step" or (number + 1) % PER_EPOCH == 0:
            scheduler.step()
    return found


def with_warmup(optimizer: Optimizer, main: LRScheduler, steps: int) -> LRScheduler:
    rise = LinearLR(optimizer, start_factor=0.01, end_factor=1.0, total_iters=steps)
    found = SequentialLR(optimizer, [rise, main], [steps])
    found.interval = "step"  # type: ignore[attr-defined]
    return found


def each_step(scheduler: LRScheduler) -> LRScheduler:
    scheduler.interval = "step"  # type: ignore[attr-defined]
    return scheduler


Make = Callable[[Optimizer], LRScheduler]
TOTAL = EPOCHS * PER_EPOCH
CASES: dict[str, tuple[Make, Make]] = {
    "cosine": (lambda o: Cosine(o, EPOCHS, 0.1), lambda o: _floor(CosineAnnealingLR(o, EPOCHS), 0.1)),
    "cosine per step": (
        lambda o: Cosine(o, EPOCHS, interval="step"),
        lambda o: each_step(CosineAnnealingLR(o, TOTAL)),
    ),
    "warm-up, cosine per step": (
        lambda o: Cosine(o, EPOCHS, interval="step", warmup_epochs=1, warmup_lr=0.004),
        lambda o: with_warmup(o, CosineAnnealingLR(o, TOTAL - PER_EPOCH), PER_EPOCH),
    ),
    "warm-up in steps": (
        lambda o: Cosine(o, EPOCHS, interval="step", warmup_steps=5, warmup_lr=0.004),
        lambda o: with_warmup(o, CosineAnnealingLR(o, TOTAL - 5), 5),
    ),
    "steps": (lambda o: Steps(o, [2, 4], 0.5), lambda o: MultiStepLR(o, [2, 4], 0.5)),
    "warm-up, steps": (
        lambda o: Steps(o, [2, 4], 0.5, warmup_epochs=1, warmup_lr=0.004),
        lambda o: with_warmup(o, MultiStepLR(o, [PER_EPOCH, 3 * PER_EPOCH], 0.5), PER_EPOCH),
    ),
    "one cycle": (lambda o: OneCycle(o, EPOCHS), lambda o: each_step(OneCycleLR(o, [0.4, 0.04], TOTAL))),
    "one cycle, no momentum": (
        lambda o: OneCycle(o, EPOCHS, pct_start=0.55, div_factor=5, final_div_factor=7, cycle_momentum=False),
        lambda o: each_step(
            OneCycleLR(
                o, [0.4, 0.04], TOTAL, pct_start=0.55, div_factor=5, final_div_factor=7, cycle_momentum=False
            )
        ),
    ),
}  # fmt: skip


def _floor(scheduler: CosineAnnealingLR, share: float) -> LRScheduler:
    """torch's cosine ends at one absolute rate for all groups, ours at a share of each."""
    from torch.optim.lr_scheduler import LambdaLR

    optimizer = scheduler.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")
    return LambdaLR(optimizer, lambda e: share + (1 - share) * (1 + math.cos(math.pi * e / EPOCHS)) / 2)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_each_value_is_that_of_torch(name: str, kind: type[Optimizer]) -> None:
    ours, theirs = CASES[name]
    one, other = an_optimizer(kind), an_optimizer(kind)
    found, expected = per_step(one, ours(one)), per_step(other, theirs(other))
    for number, (groups, references) in enumerate(zip(found, expected, strict=True)):
        for (lr, *momentum), (rate, *reference) in zip(groups, references, strict=True):
            assert lr == pytest.approx(rate, rel=1e-9, abs=1e-12), number
            for ours_now, theirs_now in zip(momentum, reference, strict=True):
                assert ours_now == (None if theirs_now is None else pytest.approx(theirs_now, rel=1e-9)), number


RESUMED: dict[str, Callable[[Optimizer, int], Schedule]] = {
    "cosine": lambda o, n: Cosine(o, n),
    "warm-up": lambda o, n: Cosine(o, n, interval="step", warmup_epochs=1.5),
    "steps": lambda o, n: Steps(o, [2], warmup_steps=3),
    "one cycle": lambda o, n: OneCycle(o, n),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("longer", [EPOCHS, 2 * EPOCHS])
def test_resumed_in_the_middle_it_continues_bitwise_also_with_more_epochs(name: str, longer: int) -> None:
    straight = an_optimizer()
    expected = per_step(straight, RESUMED[name](straight, longer), epochs=longer)
    first = an_optimizer()
    before = RESUMED[name](first, EPOCHS)
    per_step(first, before, epochs=3)
    second = an_optimizer()
    second.load_state_dict(first.state_dict())
    after = RESUMED[name](second, longer)
    after.steps_per_epoch = lambda: pytest.fail("Lightning has made no loader yet")
    after.load_state_dict(before.state_dict())
    rest = per_step(second, after, epochs=longer - 3)
    assert rest == expected[3 * PER_EPOCH :]


def test_a_checkpoint_of_torchs_multistep_is_continued() -> None:
    """An earlier version used torch's class."""
    first, second = an_optimizer(), an_optimizer()
    before = MultiStepLR(first, [2, 4])
    per_step(first, before, epochs=3)
    second.load_state_dict(first.state_dict())
    after = Steps(second, [2, 4])
    after.load_state_dict(before.state_dict())
    found = [groups[0][0] for groups in per_step(second, after, epochs=3)]
    assert found == pytest.approx([0.04] * PER_EPOCH + [0.004] * 2 * PER_EPOCH)


def test_what_cannot_work_is_refused() -> None:
    with refuses("scheduler.warmup_steps", 3, "use one of the two"):
        Cosine(an_optimizer(), 3, warmup_steps=3, warmup_epochs=1)
    with refuses("scheduler.epochs", -1, "scheduler=constant"):
        OneCycle(an_optimizer(), -1)
    optimizer = an_optimizer()
    alone = Cosine(optimizer, 3, interval="step")
    optimizer.step()
    with refuses("scheduler", None, "lightning_config"):
        alone.step()


def test_steps_of_an_epoch_count_accumulation_limits_and_the_last_smaller_step(tmp_path: Path) -> None:
    """Ten batches of which three make a step: four steps an epoch, the last of one batch."""
    settings = ["model=mlp", "logger=csv", "trainer.devices=1", "++trainer.limit_train_batches=10", "test=false"]
    settings += ["trainer.accumulate_grad_batches=3", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"]
    run = train(tmp_path, *settings, "scheduler.interval=step", "scheduler.warmup_epochs=0.5").ended()
    rows = [row for row in read(run.directory / "metrics.csv") if row.get("lr-SGD/pg1")]  # type: ignore[operator]
    by_step = {int(row["step"]): float(row["lr-SGD/pg1"]) for row in rows}
    share = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * (n / 4 - 0.5) / 1.5)) for n in range(2, 8))]
    assert [by_step[step] for step in range(8)] == pytest.approx([0.05 * each for each in share], abs=1e-9)
