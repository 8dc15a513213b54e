"""The common part of the LightningModules for contrastive learning: validation, test by probes, optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from syncbn.training.distributed.gather_rows import gather_rows
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.metrics.probe import linear_probe, nearest_neighbour
from syncbn.training.models.contrastive.losses import nearest_is_partner
from syncbn.training.models.contrastive.network import ContrastiveNetwork
from syncbn.training.models.lr_schedules import lightning_config
from syncbn.training.models.parameter_groups import parameter_groups


class Contrastive(pl.LightningModule):
    """Base of :class:`SimCLR` and :class:`MoCo`; a subclass has ``training_step``, ``embed_views`` and ``losses``.

    Batches of training and validation are two views and labels, ``(view_1, view_2, label)``; the labels are not used.
    Batches of the test are images and labels. The data module has ``clean_train_dataloader()``, which yields all
    training images without augmentation, with their labels, on each rank.

    Logged metrics, over all ranks: ``train/loss``, ``val/loss``; ``val/acc_pretext``, the share of views whose nearest
    view is of the same image; ``test/acc_probe``, the accuracy of logistic regression on frozen features of
    ``probe_labels`` training images of each class; ``test/acc_nn``, that of the nearest neighbour among all training
    images, by cosine; ``test/count``, the number of tested images.

    Args:
        network: any network for classification; see :class:`ContrastiveNetwork`.
        optimizer: called with parameter groups, returns the optimizer.
        scheduler: called with the optimizer, returns a scheduler; None for none.
        dim: length of an embedding.
        temperature: of the loss.
        probe_labels: labelled training images of each class for the linear probe.
        decay_norm: whether to apply weight decay to the parameters of normalization layers too.
    """

    compares_samples = True  # the loss compares the samples of a batch, so batches cannot be joined into one

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        dim: int = 64,
        temperature: float = 0.2,
        probe_labels: int = 10,
        decay_norm: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise SettingError("module.temperature", temperature, "use a number above 0")
        self.network = ContrastiveNetwork(network, dim)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.temperature, self.probe_labels, self.decay_norm = temperature, probe_labels, decay_norm
        # By default torchmetrics leaves NaN out of the mean; with this strategy the mean becomes NaN.
        self.train_loss, self.val_loss, self.val_pretext = (MeanMetric(nan_strategy=float("nan")) for _ in range(3))
        self._tested: list[tuple[Tensor, Tensor]] = []

    def embed_views(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings of two views of N images, shapes ``(N, dim)``, computed as the loss needs them."""
        raise NotImplementedError

    def losses(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of embeddings of all ranks: a mean, or one number per image."""
        raise NotImplementedError

    def found_partners(self, first: Tensor, second: Tensor) -> Tensor:
        """For each view of all ranks, whether the nearest view is of the same image."""
        return nearest_is_partner(first, second)

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = self.network(x)
        return embeddings

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rows, _ = gather_rows(torch.cat(self.embed_views(batch[0], batch[1]), dim=1))
        first, second = rows.chunk(2, dim=1)
        self.val_loss.update(self.losses(first, second).mean(), weight=len(rows))
        self.val_pretext.update(self.found_partners(first, second).float())
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc_pretext", self.val_pretext, on_step=False, on_epoch=True, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        self._tested = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._tested.append((self.network.encoder(batch[0]).detach(), batch[-1]))

    def on_test_epoch_end(self) -> None:
        features, labels = (gather_rows(torch.cat(part))[0] for part in zip(*self._tested, strict=True))
        self._tested = []
        known, known_labels = self._training_features()
        parts = known, known_labels, features, labels
        seed = int(getattr(self._data(), "seed", 0))
        found = {
            "test/acc_probe": linear_probe(*parts, per_class=self.probe_labels, seed=seed),
            "test/acc_nn": nearest_neighbour(*parts),
            "test/count": float(len(labels)),
        }
        self.log_dict(found, sync_dist=True)  # every rank has the same numbers

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self, decay_norm=self.decay_norm))
        if self.make_scheduler is None:
            return optimizer
        return lightning_config(optimizer, self.make_scheduler(optimizer), self._trainer)

    @torch.no_grad()
    def _training_features(self) -> tuple[Tensor, Tensor]:
        """Features and labels of all training images, on each rank, so that every rank computes the same metrics."""
        precision = self.trainer.precision_plugin
        found = []
        for images, labels in self._data().clean_train_dataloader():
            images = precision.convert_input(images).to(self.device)
            with precision.forward_context():
                found.append((self.network.encoder(images), labels.to(self.device)))
        features, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return features, labels

    def _data(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "clean_train_dataloader"):
            hint = "it has no clean_train_dataloader() for the probes; use data=digit_views, or test=false"
            raise AgreedError("data", type(data).__name__, hint)
        return data
