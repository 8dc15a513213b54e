"""Learning rates as a function of the epoch alone, so that a run that goes on can be given more epochs than it had."""

from math import cos, pi
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from syncbn.training.errors import SettingError


class Cosine(LambdaLR):
    """From the optimizer's lr along half a cosine to ``final`` of it (Loshchilov & Hutter 2017, eq. 5, one cycle).

    torch's CosineAnnealingLR keeps the length in its state and steps from one value to the next: resumed with more
    epochs it goes on with the old length and climbs up again. This one is computed from the epoch, also at the resume.

    Args:
        optimizer: whose lr is set, once an epoch.
        epochs: until the end.
        final: share of the lr that is left then, from 0 to 1.

    Raises:
        SettingError: no number of epochs.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, final: float = 0.0) -> None:
        if not isinstance(epochs, int) or epochs < 1:
            raise SettingError(
                "scheduler.epochs", epochs, "a cosine needs an end; set trainer.max_epochs or scheduler=constant"
            )
        super().__init__(optimizer, lambda epoch: final + (1 - final) * (1 + cos(pi * min(epoch / epochs, 1))) / 2)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the epoch from ``state_dict``, and the optimizer's lr from that epoch."""
        super().load_state_dict(state_dict)
        for group, base, share in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * share(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
