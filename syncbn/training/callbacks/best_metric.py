"""Records the best value of the monitored metric, which a run returns to a sweeper such as Optuna's."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class BestMetric(pl.Callback):
    """Keeps the best value of the metric that the first ModelCheckpoint monitors.

    Without a ModelCheckpoint, or where it monitors nothing, the metric is ``default`` and higher is better. NaN values
    are ignored.
    """

    def __init__(self, default: str) -> None:
        self._monitor, self._mode = default, "max"
        self._best: float | None = None

    @property
    def result(self) -> dict[str, float]:
        """The metric's name and its best value; empty if the metric was never logged or was always NaN."""
        return {} if self._best is None else {self._monitor: self._best}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor:
            self._monitor, self._mode = checkpoint.monitor, checkpoint.mode

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._take(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take(trainer)

    def _take(self, trainer: pl.Trainer) -> None:
        if self._monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self._monitor])
        is_better = self._best is None or (value < self._best if self._mode == "min" else value > self._best)
        if value == value and is_better:  # NaN is not equal to itself
            self._best = value

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self._monitor, "mode": self._mode, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["monitor"], state_dict["mode"]) == (self._monitor, self._mode):
            self._best = state_dict["best"]
