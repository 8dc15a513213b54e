"""The common part of the monitors of layers: at which steps they measure, and the CSV file that they write."""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from syncbn.training.errors import SettingError
from syncbn.training.lightning_internals import logged_step
from syncbn.training.loggers.csv_logger import MetricsFile, first_step

MAX_LOGGED_LAYERS = 16  # with more layers, loggers get summaries instead of one metric per layer


class LayerMonitor(pl.Callback):
    """Measures layers every ``every_n_steps`` steps. A subclass has its ``name`` in ``callbacks``."""

    name: str

    def __init__(self, every_n_steps: int | None = None, directory: str | Path | None = None) -> None:
        check_interval(self.name, every_n_steps)
        self.every_n_steps, self.directory = every_n_steps, directory
        self._file: MetricsFile | None = None

    def _open_file(self, trainer: pl.Trainer, columns: Sequence[str]) -> None:
        # trainer.log_dir broadcasts rank 0's directory, so all ranks have to read it (Lightning 2.6).
        directory = trainer.log_dir if self.directory is None else self.directory
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(directory or trainer.default_root_dir)
            path.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(path, f"{self.name}.csv", columns)
            # On a resume, steps after the checkpoint are measured again, so their rows are removed.
            self._file.cut(0, first_step(trainer))

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this is a step to measure: by default one at which Lightning logs step metrics."""
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (logged_step(trainer) + 1) % every == 0

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, logged_step(trainer))


def check_interval(callback: str, every_n_steps: int | None) -> None:
    """Raise a SettingError for an interval of the callback of this name that is below 1."""
    if every_n_steps is not None and every_n_steps < 1:
        raise SettingError(f"callbacks.{callback}.every_n_steps", every_n_steps, "use 1 or more, or null")
