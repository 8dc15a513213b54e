"""Measures model FLOPs utilization (MFU) of a training on GPUs."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from syncbn.nn.population_statistics import model_input
from syncbn.training.metrics import peak_flops
from syncbn.training.models import flops


class Utilization(pl.Callback):
    """Keeps the shapes of the network and of a sample, to count the FLOPs of a forward and backward pass afterwards."""

    def __init__(self) -> None:
        self._shadow: nn.Module | None = None
        self._sample: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self._shadow = flops.shadow(flops.network_of(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sample is None and trainer.is_global_zero:
            self._sample = flops.first(model_input(batch))

    def measure(self, trainer: pl.Trainer, images_per_second: float) -> dict[str, Any]:
        """MFU at this speed, on rank 0; see :func:`syncbn.training.metrics.peak_flops.utilization`.

        Returns:
            Empty if the card is unknown, nothing was trained, or the network takes other inputs than the batch's first
            part, or depends on numbers in it.
        """
        if self._shadow is None or not isinstance(self._sample, torch.Tensor):
            return {}
        counted = flops.count_training(self._shadow, self._sample)
        if counted is None:
            return {}
        about = {"card": card_name(), "precision": str(trainer.precision)}
        return peak_flops.utilization(sum(counted), images_per_second, trainer.world_size, **about)


def card_name() -> str:
    """The name of this rank's GPU; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
