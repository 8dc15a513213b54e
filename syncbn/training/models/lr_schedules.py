"""Learning-rate schedules that depend on the epoch only, so that a resumed run can have more epochs than before."""

from math import cos, pi
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from syncbn.training.errors import SettingError


class Cosine(LambdaLR):
    """Decreases the learning rate along half a cosine to ``final * lr`` (Loshchilov & Hutter 2017, eq. 5, one cycle).

    torch's CosineAnnealingLR keeps the length in its state and computes each value from the one before. Resumed with
    more epochs, it continues with the old length, and the learning rate rises again. This schedule computes the value
    from the epoch, also when it resumes.

    Args:
        optimizer: the optimizer whose learning rate is set once per epoch.
        epochs: number of epochs until ``final`` is reached.
        final: share of the initial learning rate at the end, from 0 to 1.

    Raises:
        SettingError: ``epochs`` is not a positive whole number.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, final: float = 0.0) -> None:
        if not isinstance(epochs, int) or epochs < 1:
            raise SettingError(
                "scheduler.epochs", epochs, "a cosine needs an end; set trainer.max_epochs or scheduler=constant"
            )
        super().__init__(optimizer, lambda epoch: final + (1 - final) * (1 + cos(pi * min(epoch / epochs, 1))) / 2)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch, and compute the optimizer's learning rates from it."""
        super().load_state_dict(state_dict)
        for group, base, share in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * share(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
