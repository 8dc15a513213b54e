"""Shows progress on a terminal: a line per finished epoch, and below them a bar that is redrawn."""

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from syncbn.training.console import cell
from syncbn.training.terminal import epoch_line, log_lines, train_log
from syncbn.training.terminal.epoch_line import Pace

WIDEST = 40  # characters of the bar itself
INTERVAL = 0.1  # seconds between two drawings
DONE, REST = "cyan", "bright_black"  # colours that any terminal has


class State:
    """What the bar shows, drawn as one line of any width: words that do not fit are left out, from the right.

    Attributes:
        name: of the epoch or the stage.
        done: batches so far.
        total: batches in all; None if that is unknown, and no bar is drawn.
        words: what stands behind the bar, the most important first.
    """

    def __init__(self) -> None:
        self.name, self.done, self.words = "", 0, list[str]()
        self.total: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Two columns are left free: a terminal that becomes narrower by them does not break the line in two.
        width, least = options.max_width - 2, 10 if self.total else 0
        words = self._fitting(width - len(self.name) - least)
        bar = min(WIDEST, width - len(self.name) - len(words) - 2)
        if not self.total or bar < 1:
            yield cell(f"{self.name}{words}"[: max(width, 1)])
            return
        line = Table.grid()
        drawn = ProgressBar(self.total, self.done, width=bar, style=REST, complete_style=DONE, finished_style=DONE)
        line.add_row(cell(f"{self.name}  "), drawn, cell(words))
        yield line

    def _fitting(self, room: int) -> str:
        text = ""
        for word in self.words:
            if len(text) + 2 + len(word) > room:
                break
            text += f"  {word}"
        return text


class Bar(pl.Callback):
    """On rank 0, prints a line per epoch that stays, and shows a bar below: batches, images/s, time left, metrics.

    It is redrawn after batches and never by a thread, so it reads no metric while the ranks communicate.
    """

    def __init__(self) -> None:
        self._pace, self._state = Pace(), State()
        self._live: Live | None = None
        self._proxy: FileProxy | None = None
        self._drawn = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self._live is None:
            self._start()

    on_test_start = on_train_start

    def _start(self) -> None:
        console = Console(file=train_log.terminal(), highlight=False)
        self._live = Live(
            self._state,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # train_log.divert does it: the log would miss what Live redirects
            redirect_stderr=False,
        )
        self._live.start()
        self._proxy = FileProxy(console, train_log.terminal())
        train_log.divert(self._proxy)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done, length = trainer.fit_loop.batch_idx + 1, trainer.num_training_batches
        # Lightning resets its count after this hook; in the middle of an epoch that is resumed it is below the length.
        self._show(epoch_line.epoch_name(trainer), done if done < length < math.inf else 0, length)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._pace.batch(trainer)
        if self._is_due():
            done, length, words = trainer.fit_loop.batch_idx + 1, trainer.num_training_batches, self._words(trainer)
            if trainer.max_steps > 0:
                words.insert(0, f"step {trainer.global_step}/{trainer.max_steps}")
            self._show(epoch_line.epoch_name(trainer), done, length, words)

    def on_validation_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if self._is_due():
            self._evaluation(f"{epoch_line.epoch_name(trainer)} validation", trainer.num_val_batches, arguments)

    def on_test_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if self._is_due():
            self._evaluation("test", trainer.num_test_batches, arguments)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._live is not None:
            console, words = self._live.console, epoch_line.numbers(trainer.callback_metrics)
            for line in epoch_line.hanging(epoch_line.epoch_name(trainer), epoch_line.grouped(words), console.width):
                console.print(cell(line))
            train_log.note(log_lines.full(trainer, f"step {trainer.global_step}", self._pace))
        self._pace.epoch(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _evaluation(self, name: str, lengths: Sequence[float], arguments: tuple[Any, ...]) -> None:
        """Shows a batch of an evaluation; Lightning passes module, outputs, batch, its number and the loader's."""
        number, loader = arguments[3], arguments[4] if len(arguments) > 4 else 0
        self._show(name, number + 1, lengths[loader] if loader < len(lengths) else math.inf)

    def _is_due(self) -> bool:
        return self._live is not None and time.monotonic() - self._drawn > INTERVAL

    def _words(self, trainer: pl.Trainer) -> list[str]:
        # On rank 0 alone, as Lightning's bar does it: within an epoch these are this rank's numbers, without a
        # collective. MergeMetrics has computed those of a validation on all ranks.
        metrics = {name: value for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
        numbers = {name.removesuffix("_step"): metrics[name] for name in epoch_line.once(metrics)}
        return [*epoch_line.pace_words(trainer, self._pace), *epoch_line.numbers(numbers)]

    def _show(self, name: str, done: int, length: float, words: Sequence[str] = ()) -> None:
        if self._live is None:
            return
        total = None if math.isinf(length) else int(length)
        position = f"batch {done}" if total is None else f"{done}/{total}"
        self._state.name, self._state.done, self._state.total = name, done, total
        self._state.words = [position, *words]
        self._drawn = time.monotonic()
        self._live.refresh()

    def _stop(self) -> None:
        if self._live is not None and self._proxy is not None:
            self._proxy.flush()
            train_log.divert(None)
            self._live.stop()
            self._live = self._proxy = None
