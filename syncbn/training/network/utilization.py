"""Measures model FLOPs utilization (MFU) of a training on GPUs."""

from typing import Any

import lightning.pytorch as pl
import torch

from syncbn.nn.population_statistics import model_input
from syncbn.nn.torch_internals import tree_map
from syncbn.training.metrics import peak_flops
from syncbn.training.network.flops import training_flops
from syncbn.training.network.prepare import networks


class Utilization(pl.Callback):
    """Keeps the first sample that is trained on, to count the FLOPs of its forward and backward pass afterwards."""

    def __init__(self) -> None:
        self._sample: Any = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sample is None and trainer.is_global_zero:
            first = tree_map(lambda leaf: leaf[:1].detach().clone() if isinstance(leaf, torch.Tensor) else leaf, batch)
            self._sample = (model_input(first),)

    def measure(self, trainer: pl.Trainer, images_per_second: float) -> dict[str, Any]:
        """MFU at this speed, on rank 0; see :func:`syncbn.training.metrics.peak_flops.utilization`.

        Returns:
            Empty if the card is unknown, nothing was trained, or the network takes other inputs than the batch's first
            part.
        """
        if self._sample is None or not isinstance(self._sample[0], torch.Tensor):
            return {}
        module = trainer.lightning_module
        parts = list(networks(module).values())
        flops = training_flops(parts[0] if len(parts) == 1 else module, *self._sample)
        if flops is None:
            return {}
        about = {"card": card_name(), "precision": str(trainer.precision)}
        return peak_flops.utilization(sum(flops), images_per_second, trainer.world_size, **about)


def card_name() -> str:
    """The name of this rank's GPU; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
