"""The LightningModule for semantic segmentation: cross entropy per pixel, and the mean intersection over union."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassJaccardIndex

from syncbn.training.data.loaders import global_samples
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.models.lr_schedules import lightning_config
from syncbn.training.models.parameter_groups import parameter_groups


class Segmentation(pl.LightningModule):
    """Trains any network that maps images to a score per class and pixel.

    Logged per epoch, over all devices: ``loss`` and ``miou`` under ``train/`` (the loss only), ``val/`` and ``test/``.
    ``miou`` is the mean over classes of the intersection over union, in [0, 1], from the counts of all pixels of all
    images, as on PASCAL VOC. Classes that occur neither in masks nor in predictions are left out.

    Args:
        network: maps ``(N, C, H, W)`` to scores ``(N, num_classes, H, W)``.
        optimizer: called with parameter groups, returns the optimizer.
        scheduler: called with the optimizer, returns a scheduler; None for none.
        num_classes: number of classes, background included.
        class_weights: weight of each class in the loss; None for 1. The weighted losses are divided by the number of
            pixels, not by the sum of their weights as in torch, so that the mean over devices is the loss of the whole
            batch.
        ignore_index: pixels with this label count neither in the loss nor in the metric.

    Raises:
        SettingError: another number of weights than classes; in the first step, scores or masks of another shape.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if class_weights is not None and len(class_weights) != num_classes:
            hint = f"there are {num_classes} classes; use as many weights, or null"
            raise SettingError("module.class_weights", list(class_weights), hint)
        self.network = network
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy=float("nan")) for _ in range(3))
        self.val_miou, self.test_miou = (
            MulticlassJaccardIndex(num_classes, ignore_index=ignore_index) for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        loss = self._loss(self(images), masks)
        if len(images):
            self.train_loss.update(loss.detach(), weight=len(images))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/loss_step", loss, prog_bar=True, on_step=True, on_epoch=False)
        total, ranks = global_samples(self._trainer), self.trainer.world_size
        # DDP averages over the devices. If their shares of the batch are unequal, this weight makes it the mean loss.
        return loss if total is None or total % ranks == 0 else loss * (len(images) * ranks / total)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate("val", self.val_loss, self.val_miou, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate("test", self.test_loss, self.test_miou, batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scores: Tensor = self(batch[0])
        return scores.argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self))
        if self.make_scheduler is None:
            return optimizer
        return lightning_config(optimizer, self.make_scheduler(optimizer), self._trainer)

    def _loss(self, scores: Tensor, masks: Tensor) -> Tensor:
        if scores.dim() != 4 or scores.shape[2:] != masks.shape[1:]:
            hint = (
                f"the network returns {_shape(scores)}, and the masks are {_shape(masks)}; use a network with a score"
            )
            raise AgreedError("module", "segmentation", f"{hint} per pixel, (N, classes, H, W), and masks (N, H, W)")
        weights = None if self.class_weights is None else self.class_weights.to(scores.dtype)
        losses = F.cross_entropy(scores, masks, weight=weights, ignore_index=self.ignore_index, reduction="none")
        return losses.mean() if len(masks) else losses.sum()  # the mean of no pixels would be NaN

    def _evaluate(self, stage: str, mean: MeanMetric, miou: MulticlassJaccardIndex, batch: Any) -> dict[str, Tensor]:
        """The predictions, as :mod:`syncbn.training.metrics.predictions` reads them: classes of shape ``(N, H, W)``."""
        images, masks = batch
        scores = self(images)
        predicted = scores.argmax(1)
        if len(images):  # a device may have no image in the last batch
            mean.update(self._loss(scores, masks), weight=len(images))
            miou.update(predicted, masks)
        # Metric objects are logged, not numbers: torchmetrics adds their counts over the devices.
        self.log(f"{stage}/loss", mean, on_step=False, on_epoch=True)
        self.log(f"{stage}/miou", miou, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return {"preds": predicted, "target": masks}


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})"
