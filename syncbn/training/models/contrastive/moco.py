"""The LightningModule of MoCo (He et al. 2020)."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.distributed.gather_rows import gather_rows
from syncbn.training.errors import SettingError
from syncbn.training.models.contrastive.contrastive import Contrastive
from syncbn.training.models.contrastive.losses import info_nce, nearest_key_is_partner


class MoCo(Contrastive):
    """MoCo (He et al. 2020, arXiv:1911.05722): each query has to find its key among the keys of earlier images.

    The first view is the query, embedded by ``network``. The second view is the key, embedded by ``key_network``, whose
    parameters are a moving average of those of ``network``. Its batch norm has its own running statistics. The keys of
    all devices enter the queue, which is the same on all ranks and part of checkpoints.

    Per-device statistics of batch norm reveal which query and key are on one device. MoCo therefore shuffles the keys'
    images over the devices (``norm=shuffle norm.part=key_network``).

    ``val/acc_pretext`` is the share of queries whose nearest key in the batch is of the same image. For further
    arguments and logged metrics see :class:`~syncbn.training.models.contrastive.contrastive.Contrastive`.

    Args:
        queue: number of keys in the queue, which begins with random keys.
        momentum: of the moving average: the weight of its previous value in each step.
    """

    queue: Tensor

    def __init__(self, *args: Any, queue: int = 512, momentum: float = 0.99, dim: int = 64, **settings: Any) -> None:
        super().__init__(*args, dim=dim, **settings)
        if not 0 <= momentum < 1:
            raise SettingError("module.momentum", momentum, "use a number from 0 to below 1")
        if queue < 1:
            raise SettingError("module.queue", queue, "use a whole number, 1 or more")
        self.momentum = momentum
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))

    def setup(self, stage: str) -> None:
        self.key_network.requires_grad_(False)  # norm=none has given biases to its layers since

    def embed_views(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            keys = self.key_network(second)
        return self.network(first), keys

    def losses(self, first: Tensor, second: Tensor) -> Tensor:
        # Backward needs the queue as it is now, and training_step changes it before.
        return info_nce(first, second, self.queue.clone(), self.temperature)

    def found_partners(self, first: Tensor, second: Tensor) -> Tensor:
        return nearest_key_is_partner(first, second)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._move_key_network()
        queries, keys = self.embed_views(batch[0], batch[1])
        losses = self.losses(queries, keys)
        all_keys, _ = gather_rows(keys)
        self._enqueue(all_keys)
        if len(losses):
            self.train_loss.update(losses.detach().mean(), weight=len(losses))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/loss_step", losses.detach().mean(), prog_bar=True, on_step=True, on_epoch=False)
        # DDP averages gradients over the ranks. So this is the mean over all devices' images, also of unequal shares.
        return losses.sum() * (self.trainer.world_size / len(all_keys))

    @torch.no_grad()
    def _move_key_network(self) -> None:
        for key, query in zip(self.key_network.parameters(), self.network.parameters(), strict=True):
            key.lerp_(query, 1 - self.momentum)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Put keys in front, and drop the oldest. In place, because DistributedDataParallel keeps the buffer."""
        self.queue.copy_(torch.cat([keys.to(self.queue.dtype), self.queue])[: len(self.queue)])
