"""Learning rates over the epochs of a run, and of one that is resumed."""

from pathlib import Path

from syncbn.training.loggers.csv_logger import read
from tests.training.support.train_command import Run, train

STEPS = ["model=mlp", "scheduler=steps", "scheduler.milestones=[1, 2]", "logger=csv", "trainer.devices=1"]
STEPS += ["++trainer.limit_train_batches=10", "test=false"]


def rates(run: Run) -> list[str]:
    assert run.code == 0, run.err
    assert run.directory is not None
    return [f"{float(row['lr-SGD/pg1']):.5g}" for row in read(run.directory / "metrics.csv") if row.get("lr-SGD/pg1")]


def test_steps_are_where_they_are_also_for_a_run_that_goes_on(tmp_path: Path) -> None:
    """It stops where the rate is about to change."""
    assert rates(train(tmp_path, *STEPS, "trainer.max_epochs=1", "run.id=a")) == ["0.05"]
    assert rates(train(tmp_path, *STEPS, "trainer.max_epochs=3", "run.id=a")) == ["0.05", "0.005", "0.0005"]
