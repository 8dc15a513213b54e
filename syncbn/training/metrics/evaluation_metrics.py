"""Implements the setting ``metrics``: torchmetrics' metrics over validation and test, exact over all ranks."""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from syncbn.training.console import print_line
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.metrics.predictions import RETURNS, predictions, returns_nothing

STAGES = ("val", "test")


class EvaluationMetrics(pl.Callback):
    """Computes metrics of every validation and test, and logs them as ``val/NAME`` and ``test/NAME``.

    The metrics become parts of the LightningModule, so resume points save what they have accumulated. torchmetrics
    gathers their states from all ranks: the value is that of one process on all samples. A confusion matrix is no
    number and is not logged; see ``confusion``.

    Args:
        metrics: by name; each is called with probabilities (or ``preds``) and targets, see :mod:`.predictions`.

    Attributes:
        names: of the logged metrics; ``callbacks.checkpoint.monitor`` may be one of them.
        confusion: the confusion matrix of the last validation, shape ``(classes, classes)``, rows are true classes;
            None without such a metric.

    Raises:
        SettingError: an object that is no metric of torchmetrics.
        AgreedError: when training begins or in the first evaluation, if the module does not return predictions; in an
            evaluation, if a metric fails, or returns other than one number.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                hint = f"{type(metric).__name__} is no metric of torchmetrics; use a subclass of torchmetrics.Metric"
                raise SettingError(f"metrics.{name}", hint=hint)
        self.metrics = dict(metrics)
        self.names = {f"{stage}/{name}" for stage in STAGES for name in metrics if not _is_matrix(metrics[name])}
        self.confusion: Tensor | None = None
        self._reported: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for part in STAGES:
            for name, metric in self.metrics.items():
                if not hasattr(pl_module, _attribute(part, name)):
                    setattr(pl_module, _attribute(part, name), metric.clone().to(pl_module.device))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.enable_validation and returns_nothing(pl_module, "validation_step"):
            raise self._no_predictions(pl_module, "validation_step")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset("val", pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._update("val", pl_module, outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log("val", pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset("test", pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self._update("test", pl_module, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log("test", pl_module)

    def _of(self, stage: str, pl_module: pl.LightningModule) -> dict[str, Metric]:
        return {name: getattr(pl_module, _attribute(stage, name)) for name in self.metrics}

    def _reset(self, stage: str, pl_module: pl.LightningModule) -> None:
        for metric in self._of(stage, pl_module).values():
            metric.reset()

    def _update(self, stage: str, pl_module: pl.LightningModule, outputs: Any) -> None:
        found = predictions(outputs)
        if found is None:
            raise self._no_predictions(pl_module, "validation_step" if stage == "val" else "test_step")
        if not len(found.target):  # a rank's share of the last batch may be empty
            return
        for name, metric in self._of(stage, pl_module).items():
            try:
                metric.update(found.given, found.target)
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                raise self._failed(name, error) from error

    def _log(self, stage: str, pl_module: pl.LightningModule) -> None:
        for name, metric in self._of(stage, pl_module).items():
            value = self._compute(name, metric)
            if _is_matrix(metric):
                if stage == "val":
                    self.confusion = value.cpu()
                metric.reset()
                continue
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                hint = f"it returns {shape}, not one number; use average: macro, or another metric"
                raise AgreedError(f"metrics.{name}", hint=hint)
            pl_module.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True)

    def _compute(self, name: str, metric: Metric) -> Any:
        """The value over all ranks, a collective. Lightning logs this result, and does not compute it again.

        A warning, such as that of AUROC about a class without samples, is printed once a run and not every epoch.
        """
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                value = metric.compute()
        except (ValueError, IndexError) as error:
            raise self._failed(name, error) from error
        for text in dict.fromkeys(f"metrics.{name}: {each.message}" for each in caught):
            if text not in self._reported:
                self._reported.add(text)
                print_line(text, error=True)
        return value

    def _failed(self, name: str, error: Exception) -> AgreedError:
        kind = type(self.metrics[name]).__name__
        return AgreedError(f"metrics.{name}", hint=f"{kind}: {' '.join(str(error).split())}")

    def _no_predictions(self, pl_module: pl.LightningModule, step: str) -> AgreedError:
        hint = f"{step} of {type(pl_module).__name__} returns no predictions; {RETURNS}, or use metrics=[]"
        return AgreedError("metrics", ",".join(self.metrics), hint)


def _is_matrix(metric: Any) -> bool:
    return isinstance(metric, MulticlassConfusionMatrix)


def _attribute(stage: str, name: str) -> str:
    """The name of a metric in the LightningModule."""
    return f"{stage}_metric_{name}".replace(".", "_")
