"""The LightningModule of SimCLR (Chen et al. 2020)."""

from typing import Any

import torch
from torch import Tensor

from syncbn.training.distributed.gather_rows import with_rows_of_all
from syncbn.training.models.contrastive.contrastive import Contrastive
from syncbn.training.models.contrastive.losses import nt_xent


class SimCLR(Contrastive):
    """SimCLR (Chen et al. 2020, arXiv:2002.05709): each view has to find its partner among the views of all devices.

    The loss is :func:`~syncbn.training.models.contrastive.losses.nt_xent` over all devices' images, with exact
    gradients: on any number of devices they are those of one process on the whole batch. ``network`` is called once, on
    both views. Per-device statistics of batch norm reveal which views are on one device; SimCLR therefore synchronizes
    them (``norm=sync``).

    For the arguments and the logged metrics see :class:`~syncbn.training.models.contrastive.contrastive.Contrastive`.
    """

    def embed_views(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        one, two = self.network(torch.cat([first, second])).chunk(2)
        return one, two

    def losses(self, first: Tensor, second: Tensor) -> Tensor:
        return nt_xent(first, second, self.temperature)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pairs = with_rows_of_all(torch.cat(self.embed_views(batch[0], batch[1]), dim=1))
        loss = self.losses(*pairs.chunk(2, dim=1))
        self.train_loss.update(loss.detach(), weight=len(pairs))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/loss_step", loss, prog_bar=True, on_step=True, on_epoch=False)
        # Each rank computes the same loss, and the gradient with respect to its own rows. The gradient of the weights
        # is the sum over the ranks, and DDP takes the mean.
        return loss * self.trainer.world_size
