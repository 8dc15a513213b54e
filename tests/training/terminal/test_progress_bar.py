"""The bar and the lines above it, as a terminal shows them in the end and meanwhile."""

import io
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from syncbn.training.callbacks.progress import MergeMetrics, Throughput
from syncbn.training.terminal import log_lines, progress_bar, train_log
from syncbn.training.terminal.log_lines import LogLines, shows_bar
from syncbn.training.terminal.progress_bar import Bar, State
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.screen import lines


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(state: State, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, highlight=False).print(state)
    (line,) = lines(out.getvalue(), width)
    return line


@pytest.mark.parametrize("width", [5, 12, 20, 40, 60, 80, 120, 300])
@pytest.mark.parametrize("total", [72, None])
def test_at_any_width_it_is_one_line_that_is_not_full(width: int, total: int | None) -> None:
    state = State()
    state.name, state.done, state.total = "epoch  3/15", 12, total
    state.words = ["12/72", "1,234 images/s", "0:42 left", *(f"metric{n} 0.1234" for n in range(20))]
    line = drawn(state, width)
    assert len(line) < width
    if width >= 40:
        assert line.startswith("epoch  3/15  ")
        assert "12/72" in line
    if width >= 80:
        assert "  12/72  1,234 images/s  0:42 left" in line


def test_what_is_done_is_drawn_in_proportion() -> None:
    state = State()
    state.name, state.total, state.words = "epoch 1/2", 10, ["x"]
    for done in (0, 5, 10):
        state.done = done
        out = io.StringIO()
        Console(file=out, width=80, force_terminal=True, no_color=True).print(state)
        assert abs(out.getvalue().count("━") - 4 * done) <= 1


class Module(pl.LightningModule):
    """Logs a metric with its twins, and prints a line, a warning and a log record meanwhile."""

    def __init__(self, speaks: bool = False) -> None:
        super().__init__()
        self.layer, self.speaks = nn.Linear(1, 1), speaks

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        if self.speaks and self.current_epoch == 1 and index == 2:
            print("a line of the user's")
            logging.getLogger("a.library").warning("a record")
            sys.stderr.write(warnings.formatwarning("take care", UserWarning, "file.py", 3, ""))
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/acc", 0.5)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test/acc", 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Endless(IterableDataset[Tensor]):
    def __init__(self, length: float = math.inf) -> None:
        self.length = length

    def __iter__(self) -> Any:
        number = 0
        while number < self.length:
            number += 1
            yield torch.ones(1)


DATA = DataLoader(TensorDataset(torch.ones(8, 1)), 2)


def fit(progress: pl.Callback, *, module: pl.LightningModule | None = None, data: Any = DATA, **options: Any) -> None:
    trainer = quiet_trainer(MergeMetrics(), Throughput(), progress, **options)
    module = module or Module()
    trainer.fit(module, data, DATA)
    trainer.test(module, DATA, verbose=False)


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """Within the test and no fixture: pytest sets the streams again when a test begins."""
    out = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "xterm")
        patch.setattr(progress_bar, "INTERVAL", 0.0)
        yield out


@QUIET
def test_a_line_an_epoch_stays_and_what_is_printed_meanwhile_is_above_the_bar(tmp_path: Path) -> None:
    library = logging.getLogger("a.library")
    with on_terminal() as terminal:
        handler = logging.StreamHandler(terminal)
        terminal.fileno = lambda: 2  # type: ignore[method-assign]  # so that the handler is one for standard error
        library.addHandler(handler)
        with train_log.copying() as log:
            log.begin(tmp_path)
            fit(Bar(), module=Module(speaks=True), max_epochs=3)
        library.removeHandler(handler)
        assert handler.stream is terminal
    shown = lines(terminal.getvalue())
    loss = shown[0].partition("loss ")[2].split()[0]
    assert shown[0] == f"epoch 1/3  train loss {loss}  val acc 0.5000"
    assert shown[1:4] == ["a line of the user's", "a record", "file.py:3: UserWarning: take care"]
    assert shown[4:] == [f"epoch {n}/3  train loss {loss}  val acc 0.5000" for n in (2, 3)]
    written = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert "\x1b" not in "".join(written)
    epochs = [line for line in written if line.startswith("epoch ")]
    assert [line.partition("  train/loss ")[0] for line in epochs] == [f"epoch {n}/3  step {4 * n}" for n in (1, 2, 3)]
    assert all(line.count("loss") == 1 for line in epochs)
    assert set(shown[1:4]) < set(written)


@QUIET
def test_meanwhile_there_is_a_bar_from_epoch_1() -> None:
    with on_terminal() as terminal:
        fit(Bar(), max_epochs=2)
    states = bars(terminal)
    assert any(state.startswith("epoch 1/2  ━") and "  3/4" in state for state in states)
    assert any(" images/s  0:00 left  train/loss " in state or " images/s  train/loss " in state for state in states)
    assert any(state.startswith("epoch 2/2 validation  ━") and state.endswith("  2/4") for state in states)
    assert any(state.startswith("test  ━") and state.endswith("  4/4") for state in states)
    assert not any("epoch 0" in state or "v_num" in state or "_step" in state for state in states)


def bars(terminal: Terminal) -> list[str]:
    """What each drawing of the bar shows."""
    return ["\n".join(lines(part)) for part in terminal.getvalue().split("\x1b[2K")]


@QUIET
@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (DATA, {"max_epochs": -1, "max_steps": 6}, ["epoch 1  ━", "  2/4  step 2/6"]),
        (DataLoader(Endless(), 2), {"max_epochs": -1, "max_steps": 3}, ["epoch 1  batch 2  step 2/3"]),
        (DataLoader(Endless(6), 2), {"max_epochs": 2}, ["epoch 1/2  batch 3", "epoch 2/2  batch 1"]),
    ],
)
def test_training_without_a_length(data: Any, options: dict[str, Any], expected: list[str]) -> None:
    with on_terminal() as terminal:
        fit(Bar(), data=data, **options)
    for text in expected:
        assert any(text in state for state in bars(terminal)), text


@QUIET
def test_an_exception_takes_the_bar_away_and_shows_the_cursor() -> None:
    class Fails(Module):
        def on_validation_end(self) -> None:
            raise ValueError("no")

    with on_terminal() as terminal, train_log.copying(), pytest.raises(ValueError, match="no"):
        fit(Bar(), module=Fails(), max_epochs=2, num_sanity_val_steps=0)
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")
    assert lines(terminal.getvalue()) == []


@QUIET
def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fit(LogLines(), data=DataLoader(Endless(6), 2), max_epochs=2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2  step 3  train/loss ")
    assert "  val/acc 0.5000  " in first
    assert first.count("loss") == 1
    assert second.startswith("epoch 2/2  step 6  ")
    assert second.endswith(" images/s")
    fit(LogLines(seconds=-1.0), data=DataLoader(Endless(), 2), max_epochs=-1, max_steps=2)
    positions = [line.split("  train")[0] for line in capsys.readouterr().out.splitlines()]
    assert positions[:2] == ["epoch 1  batch 1", "epoch 1  batch 2"]


@pytest.mark.parametrize(
    ("term", "notebook", "bar"),
    [("xterm-256color", False, True), ("dumb", False, False), ("", False, False), ("xterm-color", True, False)],
)
def test_where_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, term: str, notebook: bool, bar: bool) -> None:
    monkeypatch.setattr(log_lines.sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    if notebook:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert shows_bar({}) is bar
    assert shows_bar({"enable_progress_bar": not bar}) is not bar
    monkeypatch.setattr(log_lines.sys, "stdout", io.StringIO())
    assert not shows_bar({})


@QUIET
def test_other_ranks_show_nothing() -> None:
    trainer = quiet_trainer(Throughput(), Bar(), max_epochs=1)
    with on_terminal() as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "is_global_zero", property(lambda _: False))
        trainer.fit(Module(), DATA, DATA)
    assert terminal.getvalue() == ""
