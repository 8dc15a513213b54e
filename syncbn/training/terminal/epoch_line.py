"""Composes the line of an epoch: position, metrics, images per second and the time that is left."""

import math
import time
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from syncbn.training.callbacks.progress import Throughput
from syncbn.training.terminal.metric_rows import number

TWINS = ("_step", "_epoch")  # Lightning logs name, name_step and name_epoch for on_step=True, on_epoch=True


class Pace:
    """Measures images per second since the last epoch's end, and estimates the time that training still takes."""

    def __init__(self) -> None:
        self._began = 0.0
        self._batches = self._steps = self._first_step = 0  # of this process, after the warm-up
        self._epoch_batches: int | None = None  # of the last whole epoch, for data of unknown length
        self._mark = (0, 0.0)  # samples and seconds at the last epoch's end

    def batch(self, trainer: pl.Trainer) -> None:
        """To be called after each batch. The first one is the warm-up, from whose end on the time counts."""
        if not self._began:
            self._began, self._first_step = time.monotonic(), trainer.global_step
            return
        self._batches += 1
        self._steps = trainer.global_step - self._first_step

    def images_per_second(self, trainer: pl.Trainer) -> float:
        """Images per second of the epoch so far, over all devices; 0 if it is not known."""
        samples, seconds = self._measured(trainer)
        return (samples - self._mark[0]) / (seconds - self._mark[1]) if seconds > self._mark[1] else 0.0

    def epoch(self, trainer: pl.Trainer) -> None:
        """To be called when an epoch has ended."""
        self._mark, self._epoch_batches = self._measured(trainer), trainer.fit_loop.batch_idx + 1

    def seconds_left(self, trainer: pl.Trainer) -> float | None:
        """Seconds until the last epoch, step or minute, whichever comes first; None if it is not known.

        The time per batch is the mean since the start, with validations and checkpoints. Early stopping may end
        training before.
        """
        if trainer.should_stop:
            return 0.0
        spent, found = time.monotonic() - self._began, list[float]()
        if self._batches and (left := self._batches_left(trainer)) is not None:
            found.append(left * spent / self._batches)
        if self._steps and trainer.max_steps > 0:
            found.append((trainer.max_steps - trainer.global_step) * spent / self._steps)
        for timer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(timer, Timer) and (remaining := timer.time_remaining()) is not None:
                found.append(remaining)
        return max(min(found), 0.0) if found else None

    def _batches_left(self, trainer: pl.Trainer) -> float | None:
        length = trainer.num_training_batches
        per_epoch = self._epoch_batches if math.isinf(length) else length
        if trainer.max_epochs is None or trainer.max_epochs < 0 or per_epoch is None:
            return None
        return (trainer.max_epochs - trainer.current_epoch) * per_epoch - (trainer.fit_loop.batch_idx + 1)

    @staticmethod
    def _measured(trainer: pl.Trainer) -> tuple[int, float]:
        found = [each for each in trainer.callbacks if isinstance(each, Throughput)]  # type: ignore[attr-defined]
        return (found[0].samples, found[0].seconds) if found else (0, 0.0)


def epoch_name(trainer: pl.Trainer) -> str:
    """The epoch, counted from 1, and the number of epochs if training has one: ``epoch  3/15``."""
    last, epoch = trainer.max_epochs, trainer.current_epoch + 1
    return f"epoch {epoch:>{len(str(last))}}/{last}" if last is not None and last > 0 else f"epoch {epoch}"


def once(metrics: Mapping[str, object]) -> list[str]:
    """The names of the metrics without learning rates, sorted; of a metric and its twins only the metric."""
    return sorted(name for name in metrics if not (name.startswith("lr-") or _is_twin(name, metrics)))


def _is_twin(name: str, metrics: Mapping[str, object]) -> bool:
    """Whether a metric is shown under another name: ``x_step`` and ``x_epoch`` as ``x``, or ``x_epoch`` as ``x_step``.

    For its progress bar Lightning has no ``x``.
    """
    metric = next((name.removesuffix(end) for end in TWINS if name.endswith(end)), None)
    return metric is not None and (metric in metrics or (name.endswith("_epoch") and f"{metric}_step" in metrics))


def numbers(metrics: Mapping[str, object]) -> list[str]:
    """Each metric once, as ``name 0.1234``."""
    return [f"{name} {number(float(metrics[name]))}" for name in once(metrics)]  # type: ignore[arg-type]


def duration(seconds: float) -> str:
    """``0:42``, ``12:03``, ``5:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def pace_words(trainer: pl.Trainer, pace: Pace) -> list[str]:
    """Images per second and the time left, as far as they are known."""
    speed, left = pace.images_per_second(trainer), pace.seconds_left(trainer)
    words = [f"{speed:,.0f} images/s"] if speed else []
    return [*words, f"{duration(left)} left"] if left else words


def grouped(words: list[str]) -> list[str]:
    """``train/acc 0.7``, ``train/loss 1.2``, ``val/acc 0.8`` as ``train acc 0.7``, ``loss 1.2``, ``val acc 0.8``.

    So a line with the metrics of training and validation fits into 80 columns.
    """
    shown, before = list[str](), ""
    for word in words:
        stage, found, name = word.partition("/")
        shown.append(word if not found else name if stage == before else f"{stage} {name}")
        before = stage if found else ""
    return shown


def hanging(first: str, words: list[str], width: int) -> list[str]:
    """Lines of at most ``width`` characters, which are broken between words; the later ones are indented."""
    lines, indent = [first], " " * (len(first) + 2)
    for word in words:
        if len(lines[-1]) + 2 + len(word) > width and lines[-1].strip():
            lines.append(indent + word)
        else:
            lines[-1] += f"  {word}"
    return lines
