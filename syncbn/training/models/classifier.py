"""The LightningModule for classification: loss, metrics, and weight decay without the normalization layers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from syncbn.nn.comm import all_reduce
from syncbn.training.data.loaders import global_samples
from syncbn.training.data.shards import ShardBatch
from syncbn.training.errors import AgreedError
from syncbn.training.models.lr_schedules import lightning_config
from syncbn.training.models.parameter_groups import parameter_groups, scale_rates


class Classifier(pl.LightningModule):
    """Cross entropy and accuracy for any network that maps images to class scores.

    The optimizer steps on the mean loss over the global batch, even if the ranks' shares of it are unequal or empty
    (``data.remainder=uneven``).

    Logged metrics: ``train/loss_step`` (of this rank's batch), and per epoch ``loss`` and ``acc`` under ``train/``,
    ``val/`` and ``test/``, over all ranks and weighted by the number of samples. ``test/count`` is the number of tested
    samples. If the data module has ``num_shards``, the accuracy of each shard is logged as ``acc_shard0``,
    ``acc_shard1``, ... under ``val/`` and ``test/``.

    Targets are labels of shape ``(N,)``, or soft targets of shape ``(N, num_classes)`` (mixup, CutMix). The accuracy of
    soft targets is that of the class with the largest share.

    Args:
        network: maps ``(N, *)`` to scores ``(N, num_classes)``.
        optimizer: called with parameter groups, returns the optimizer.
        scheduler: called with the optimizer, returns a scheduler; torch's step once per epoch; None for none.
        num_classes: number of classes.
        label_smoothing: share of the target that is distributed evenly over all classes.
        decay_norm: whether to apply weight decay to the parameters of normalization layers too. Off by default, since
            there it only changes the effective learning rate (Zhang et al. 2019).
        layer_decay, lr_scale: learning rates of layers; see :func:`~syncbn.training.models.parameter_groups.
            parameter_groups`.
        class_weights: weights of the classes in the training loss: one number per class, or "balanced" for N / (K n_c)
            with N training samples, n_c of class c, of K classes (the data module's ``class_counts``). As in torch, the
            loss of labels is the sum over the global batch divided by the sum of its weights; that of soft targets is
            divided by the number of samples. Validation and test are not weighted.

    Attributes:
        class_accuracy: after a test, for each class its number of samples and their accuracy (NaN for no sample).
    """

    accepts_soft_targets = True
    class_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        decay_norm: bool = False,
        layer_decay: float | None = None,
        lr_scale: dict[str, float] | None = None,
        class_weights: Sequence[float] | str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.label_smoothing, self.decay_norm = label_smoothing, decay_norm
        self.layer_decay, self.lr_scale = layer_decay, lr_scale
        # Attributes, not a ModuleDict: a ModuleDict refuses keys that are attributes of Module, such as "train".
        for stage in ("train", "val", "test"):
            setattr(self, f"{stage}_acc", MulticlassAccuracy(num_classes, average="micro"))
            # By default torchmetrics leaves NaN losses out of the mean; with this strategy the mean becomes NaN.
            setattr(self, f"{stage}_mean_loss", MeanMetric(nan_strategy=float("nan")))
        self.count = SumMetric()
        self.test_classes = MulticlassStatScores(num_classes, average=None)
        self.class_accuracy: list[tuple[int, float]] = []
        self.num_shards = 0
        self.weighting, weights = class_weights, None
        if class_weights is not None and not isinstance(class_weights, str):
            weights = torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def setup(self, stage: str) -> None:
        self.num_classes = outputs = self.test_classes.num_classes
        self.num_shards = getattr(getattr(self.trainer, "datamodule", None), "num_shards", None) or 0
        for name in (f"{stage}_acc_shard{shard}" for stage in ("val", "test") for shard in range(self.num_shards)):
            if not hasattr(self, name):
                setattr(self, name, MeanMetric().to(self.device))
        if stage == "fit" and self.weighting == "balanced":
            counts = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
            if not counts or not all(counts):
                hint = "the data module has no class_counts of all classes; give a list of numbers, one per class"
                raise AgreedError("module.class_weights", "balanced", hint)
            if len(counts) != outputs:
                hint = f"the data have {len(counts)} classes and the network has {outputs} outputs; use a list of "
                raise AgreedError("module.class_weights", "balanced", f"{hint}{outputs} numbers")
            weights = [sum(counts) / (len(counts) * count) for count in counts]
            self.class_weights = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.network(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.class_weights is not None:
            return self._weighted_step(batch, self.class_weights)
        loss, _ = self._step("train", batch)
        self.log("train/loss_step", loss, prog_bar=True, on_step=True, on_epoch=False)
        total = global_samples(self._trainer)
        ranks = 1 if total is None else self.trainer.world_size
        if total is None or total % ranks == 0:
            return loss
        # DDP averages gradients over the ranks. With this weight, the average is the gradient of the mean loss over all
        # samples of the global batch.
        return loss * (len(batch[0]) * ranks / total)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        found = self._evaluate("test", batch)
        self.count.update(len(batch[0]))
        self.log("test/count", self.count, on_step=False, on_epoch=True)
        return found

    def on_test_epoch_start(self) -> None:
        self.test_classes.reset()

    def on_test_epoch_end(self) -> None:
        scores = self.test_classes.compute()  # summed over the ranks, a collective; columns: tp, fp, tn, fn, support
        right, counts = scores[:, 0], scores[:, 4]
        self.class_accuracy = list(zip(counts.tolist(), (right / counts).tolist(), strict=True))

    def _weighted_step(self, batch: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
        """The loss whose gradient, averaged by DDP, is that of the weighted mean over the global batch."""
        x, target = batch
        scores = self(x)
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "reduction": "sum"}
        total = F.cross_entropy(scores, target, weight=weights.to(scores.dtype), **options)
        # As torch: labels are divided by their weights, soft targets by their number.
        mine = total.detach().new_tensor(len(x)) if target.is_floating_point() else weights[target].sum().to(total)
        ranks = self.trainer.world_size
        over_ranks = _sum_over_ranks(mine, ranks)
        mean_loss: MeanMetric = getattr(self, "train_mean_loss")  # noqa: B009  # typed as any module otherwise
        mean = torch.where(mine > 0, total.detach() / mine, 0.0)  # 0 for a share that is empty or has no weight
        if len(x):
            mean_loss.update(mean, weight=mine)
        self._log_accuracy("train", scores, target)
        self.log("train/loss", mean_loss, on_step=False, on_epoch=True)
        self.log("train/loss_step", mean, prog_bar=True, on_step=True, on_epoch=False)
        return total * torch.where(over_ranks > 0, ranks / over_ranks, 0.0)  # without any weight the gradient is 0

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The predictions, as :mod:`syncbn.training.metrics.predictions` reads them."""
        _, scores = self._step(stage, batch)
        return {"scores": scores.detach(), "target": batch[1]}

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of a batch, which is logged with its accuracy, and the scores."""
        x, target = batch
        scores = self(x)
        # For an empty batch the mean is NaN. The sum is zero with zero gradients, so the rank still joins DDP's
        # collectives in the backward pass.
        reduction = "mean" if len(x) else "sum"
        loss = F.cross_entropy(scores, target, label_smoothing=self.label_smoothing, reduction=reduction)
        mean_loss: MeanMetric = getattr(self, f"{stage}_mean_loss")
        if len(x):
            mean_loss.update(loss.detach(), weight=len(x))
        if isinstance(batch, ShardBatch):
            self._log_shards(stage, scores.detach().argmax(1) == target, batch.shards)
        # Metric objects are logged, not numbers: torchmetrics sums their states over the ranks, which weights ranks
        # with unequal numbers of samples correctly.
        self.log(f"{stage}/loss", mean_loss, on_step=False, on_epoch=True)
        self._log_accuracy(stage, scores, target)
        return loss, scores

    def _log_accuracy(self, stage: str, scores: Tensor, target: Tensor) -> None:
        accuracy: MulticlassAccuracy = getattr(self, f"{stage}_acc")
        labels = target.argmax(1) if target.is_floating_point() else target
        if len(labels):
            accuracy.update(scores.detach(), labels)
        if len(labels) and stage == "test":
            self.test_classes.update(scores.detach(), labels)
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")

    def _log_shards(self, stage: str, right: Tensor, shards: Tensor) -> None:
        for shard in range(self.num_shards):
            metric: MeanMetric = getattr(self, f"{stage}_acc_shard{shard}")
            metric.update(right[shards == shard].float())  # also with no sample: all ranks must log the same metrics
            self.log(f"{stage}/acc_shard{shard}", metric, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        rates: dict[str, Any] = {"layer_decay": self.layer_decay, "lr_scale": self.lr_scale}
        optimizer = self.make_optimizer(parameter_groups(self, decay_norm=self.decay_norm, **rates))
        scale_rates(optimizer)
        if self.make_scheduler is None:
            return optimizer
        return lightning_config(optimizer, self.make_scheduler(optimizer), self._trainer)


def _sum_over_ranks(value: Tensor, ranks: int) -> Tensor:
    """One all-reduce. Lightning's ``strategy.reduce`` has a barrier before it, for which the host waits on a GPU."""
    if all_reduce.is_alone():  # the step is repeated on this rank only
        return value * ranks
    value = value.clone()
    if ranks > 1:
        dist.all_reduce(value)
    return value
