"""TimeToTarget: which step, and which seconds."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from syncbn.training import SettingError, TimeToTarget
from syncbn.training.callbacks import time_to_target
from syncbn.training.errors import AgreedError
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.settled_config import settled

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Clock:
    """A training step takes a second, a validation step 100, a checkpoint 10,000."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Lit(pl.LightningModule):
    """The k-th validation gives the k-th accuracy."""

    def __init__(self, clock: Clock, accuracies: list[float]) -> None:
        super().__init__()
        self.net, self.clock, self.accuracies = nn.Linear(1, 1), clock, accuracies

    def training_step(self, batch: Tensor) -> Tensor:
        self.clock.now += 1
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor) -> None:
        self.clock.now += 100
        self.log("val/acc", self.accuracies.pop(0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.clock.now += 10_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_to_target, "time", clock)
    return clock


def fit(
    where: Path, lit: Lit, callback: TimeToTarget, ckpt_path: Path | None = None, **options: Any
) -> dict[str, float]:
    keeps = ModelCheckpoint(where, "{step}", monitor="val/acc", mode="max", save_top_k=-1)
    options = {"val_check_interval": 2, "num_sanity_val_steps": 1} | options
    trainer = quiet_trainer(callback, keeps, enable_checkpointing=True, **options)
    data = [DataLoader(torch.ones(n, 1, 1), batch_size=None) for n in (6, 1)]
    trainer.fit(lit, *data, ckpt_path=ckpt_path)
    return callback.result


ACCURACIES = [0.99, 0.1, 0.2, 0.5, 0.95, 0.7, 0.99]  # the first is the sanity check's


@pytest.mark.parametrize(("target", "spent"), [(0.95, 8), (1.0, 12)])  # 0.95 is less in float32 than in Python
def test_the_first_validation_that_reaches_it_counts_and_its_own_time_does_not(
    tmp_path: Path, clock: Clock, target: float, spent: int
) -> None:
    """Not reached, it is a lower bound."""
    found = fit(tmp_path, Lit(clock, list(ACCURACIES)), TimeToTarget("val/acc", target), max_epochs=2)
    assert found == {"target/steps": spent, "target/seconds": spent, "target/reached": int(target < 1)}


def test_steps_and_seconds_go_on_from_a_checkpoint(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, Lit(clock, list(ACCURACIES)), TimeToTarget("val/acc", 0.95), max_epochs=2)
    before, after = tmp_path / "step=6.ckpt", tmp_path / "step=10.ckpt"
    clock.now = 10**6
    lit = Lit(clock, [0.1, 0.97, 0.98])
    found = fit(tmp_path / "before", lit, TimeToTarget("val/acc", 0.95), before, num_sanity_val_steps=0, max_epochs=2)
    assert found == {"target/steps": 10, "target/seconds": 10, "target/reached": 1}
    lit = Lit(clock, [0.1, 0.1])
    found = fit(tmp_path / "after", lit, TimeToTarget("val/acc", 0.95), after, num_sanity_val_steps=0, max_epochs=2)
    assert found == {"target/steps": 8, "target/seconds": 8, "target/reached": 1}


def test_nothing_is_told_of_a_target_that_may_have_been_reached_before(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(TimeToTarget):
        def state_dict(self) -> dict[str, Any]:
            return {}

    fit(tmp_path, Lit(clock, list(ACCURACIES)), Silent("val/acc", 0.95), max_epochs=2)
    assert not capsys.readouterr().err.count("warning: target")
    options = {"num_sanity_val_steps": 0, "max_epochs": 2}
    line = "warning: target=0.95: training resumes from a checkpoint that was written without this target, so it may "
    counting, before = tmp_path / "counting", tmp_path / "step=6.ckpt"
    fit(counting, Lit(clock, list(ACCURACIES)), TimeToTarget("val/acc", 0.99), max_epochs=2)
    for number, checkpoint in enumerate((before, counting / "step=6.ckpt")):  # no word on a target, and another
        where, lit = tmp_path / str(number), Lit(clock, [0.1, 0.3, 0.97])
        assert fit(where, lit, TimeToTarget("val/acc", 0.95), checkpoint, **options) == {}
        assert capsys.readouterr().err.count(line) == 1
        again, lit = tmp_path / f"{number} again", Lit(clock, [0.97])
        assert fit(again, lit, TimeToTarget("val/acc", 0.95), where / "step=10.ckpt", **options) == {}
        assert capsys.readouterr().err.count(line) == 1


def test_a_validation_that_is_not_there_or_logs_something_else_is_refused(tmp_path: Path, clock: Clock) -> None:
    with refuses("target", 0.9, "validations log no val/top5 ", ", but val/acc", kind=AgreedError):
        fit(tmp_path, Lit(clock, list(ACCURACIES)), TimeToTarget("val/top5", 0.9), max_epochs=1)
    with refuses("target", 0.9, "there is no validation ", " or target=null", kind=AgreedError):
        fit(tmp_path, Lit(clock, []), TimeToTarget("val/acc", 0.9), max_epochs=1, limit_val_batches=0)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["target=0"], r"target=0\.0: use an accuracy above 0 and at most 1, or null"),
        (["target=95"], r"target=95\.0: use an accuracy above 0 and at most 1, or null"),
        (["target=nan"], r"target=nan: use an accuracy above 0 and at most 1, or null"),
        (
            ["target=0.9", "callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min"],
            r"target=0\.9: callbacks\.checkpoint\.monitor=val/loss is better the lower it is .*; use target=null",
        ),
        (["fit=true", "test=false"], "fit=true: test=false leaves no test to compare with; use test=true"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: list[str], line: str) -> None:
    with pytest.raises(SettingError, match=f"^{line}$"):
        settled(*settings)
    if settings[0] == "target=95":
        with refuses("target", 95, "use an accuracy above 0 and at most 1, or null"):
            TimeToTarget("val/acc", 95)
