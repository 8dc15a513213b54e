"""The LightningModule for classification."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from syncbn.nn.torch_internals import NormBase
from syncbn.training.data.loaders import global_samples
from syncbn.training.data.shards import ShardBatch

NORMALIZATION = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


class Classifier(pl.LightningModule):
    """Cross entropy and accuracy for any network that maps images to class scores.

    The optimizer's step is that of the mean loss over the global batch, also where ranks hold unequal shares of it, or
    none (``data.remainder=uneven``).

    Logged: ``train/loss_step`` (this rank's batch), and per epoch, over all ranks and exactly weighted by samples,
    ``loss`` and ``acc`` under ``train/``, ``val/`` and ``test/``; ``test/count`` is the number of samples tested.
    Where the data module has ``num_shards``, there is also ``acc_shard0`` and so on, of each shard by itself.

    Args:
        network: maps ``(N, *)`` to scores ``(N, num_classes)``.
        optimizer: called with parameter groups, gives the optimizer.
        scheduler: called with the optimizer, gives a scheduler that steps once an epoch; None for none.
        num_classes: how many classes.
        label_smoothing: share of the target spread evenly over all classes.
        decay_norm: weight decay on the parameters of normalization layers too; off, since there it only changes the
            effective learning rate (Zhang et al. 2019).
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        decay_norm: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.label_smoothing, self.decay_norm = label_smoothing, decay_norm
        # Attributes, not a ModuleDict: it takes no key that a Module has as a name, and "train" is one.
        for stage in ("train", "val", "test"):
            setattr(self, f"{stage}_acc", MulticlassAccuracy(num_classes, average="micro"))
            # By default torchmetrics leaves losses that are nan out of the mean; here they make it nan.
            setattr(self, f"{stage}_mean_loss", MeanMetric(nan_strategy=float("nan")))
        self.count = SumMetric()
        self.num_shards = 0

    def setup(self, stage: str) -> None:
        self.num_shards = getattr(getattr(self.trainer, "datamodule", None), "num_shards", None) or 0
        for name in (f"{stage}_acc_shard{shard}" for stage in ("val", "test") for shard in range(self.num_shards)):
            if not hasattr(self, name):
                setattr(self, name, MeanMetric().to(self.device))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.network(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._step("train", batch)
        self.log("train/loss_step", loss, prog_bar=True, on_step=True, on_epoch=False)
        total = global_samples(self._trainer)
        ranks = 1 if total is None else self.trainer.world_size
        if total is None or total % ranks == 0:
            return loss
        # Gradients are averaged over the ranks. With this weight that is the gradient of the mean over all samples.
        return loss * (len(batch[0]) * ranks / total)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step("test", batch)
        self.count.update(len(batch[0]))
        self.log("test/count", self.count, on_step=False, on_epoch=True)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        scores = self(x)
        # The mean of no samples is NaN; their sum is zero, and so are its gradients.
        reduction = "mean" if len(x) else "sum"
        loss = F.cross_entropy(scores, target, label_smoothing=self.label_smoothing, reduction=reduction)
        mean_loss: MeanMetric = getattr(self, f"{stage}_mean_loss")
        accuracy: MulticlassAccuracy = getattr(self, f"{stage}_acc")
        if len(x):
            mean_loss.update(loss.detach(), weight=len(x))
            accuracy.update(scores.detach(), target)
        if isinstance(batch, ShardBatch):
            self._log_shards(stage, scores.detach().argmax(1) == target, batch.shards)
        # Metrics, not numbers: torchmetrics merges their states over the ranks, so shares of unequal size count right.
        self.log(f"{stage}/loss", mean_loss, on_step=False, on_epoch=True)
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss

    def _log_shards(self, stage: str, right: Tensor, shards: Tensor) -> None:
        for shard in range(self.num_shards):
            metric: MeanMetric = getattr(self, f"{stage}_acc_shard{shard}")
            metric.update(right[shards == shard].float())  # of none too: all ranks log the same
            self.log(f"{stage}/acc_shard{shard}", metric, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self, decay_norm=self.decay_norm))
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


def parameter_groups(module: nn.Module, *, decay_norm: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters of ``module`` as optimizer groups, those of normalization layers without weight decay.

    Args:
        module: any module; a parameter shared by two layers is listed once.
        decay_norm: one group for all, with the optimizer's weight decay.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if decay_norm:
        return [{"params": trainable}]
    norm = {p for m in module.modules() if isinstance(m, NORMALIZATION) for p in m.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p not in norm]},
        {"params": [p for p in trainable if p in norm], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
