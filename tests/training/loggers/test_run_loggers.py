"""Custom loggers beside ``metrics.csv``: which of their methods are called, and what happens when one fails."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch.loggers import Logger

from tests.training.support.attempt import attempt


class Mine(Logger):
    """A custom logger, some of whose methods have names that our own loggers use in another sense."""

    name, version = "mine", 0
    calls: ClassVar[list[str]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append("log_metrics")

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.calls.append("log_hyperparams")

    def finalize(self, status: str) -> None:
        self.calls.append(f"finalize {status}")

    def resume(self) -> None:
        self.calls.append("resume")

    def end(self) -> None:
        self.calls.append("end")


def test_a_custom_logger_may_have_methods_resume_and_end_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mine, "calls", [])
    mine = {"mine": {"_target_": f"{__name__}.Mine"}}
    attempt(tmp_path / "run", loggers=mine, steps=5, save_at=4)
    attempt(tmp_path / "run", loggers=mine, steps=10, about={"attempt": 2})
    assert set(Mine.calls) == {"log_hyperparams", "log_metrics", "finalize success"}
    assert Mine.calls.count("finalize success") == 2
