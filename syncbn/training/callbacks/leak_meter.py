"""The callback that measures what batch statistics reveal to a contrastive loss."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl

from syncbn.training.data.contrastive.held_out import batches_without_end, held_out_loader
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.evaluation.measure_leak import measure_leak
from syncbn.training.evaluation.precise_statistics import prepared
from syncbn.training.lightning_internals import logged_step
from syncbn.training.models.contrastive.losses import nearest_is_partner

_ERROR = partial(AgreedError, "callbacks.leak")


class LeakMeter(pl.Callback):
    """Measures the leak of batch statistics when training ends, with the final weights, on held-out images.

    ``leak/together`` is the pretext accuracy with both views of an image on one device, ``leak/spread`` that with the
    second views on the next device, and ``leak/difference`` their difference: what statistics reveal about which views
    sit together. It is 0 where statistics are shared by all devices, and with group norm. See
    :func:`~syncbn.training.evaluation.measure_leak.measure_leak` for what is measured and what is left unchanged.

    The module is called on both views joined, unless it has a method ``embed_views(view_1, view_2)`` that returns the
    embeddings of both as its loss takes them. A method ``found_partners(embeddings_1, embeddings_2)`` replaces the rule
    by which a partner counts as found.

    Args:
        num_batches: batches to measure on.
        batches: returns batches that begin with two views, equally many on each rank; None for batches of the
            validation data, as large as those of training.

    Raises:
        SettingError: ``num_batches`` below 1.
        AgreedError: when training begins, on all ranks, if no batches can be made of the validation data.
    """

    def __init__(self, num_batches: int = 20, *, batches: Callable[[], Iterable[Any]] | None = None) -> None:
        if num_batches < 1:
            raise SettingError("callbacks.leak.num_batches", num_batches, "use a whole number, 1 or more")
        self.num_batches, self.batches = num_batches, batches
        self._result: dict[str, float] = {}

    @property
    def result(self) -> dict[str, float]:
        """``leak/together``, ``leak/spread`` and ``leak/difference``; empty before training has ended."""
        return self._result

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batches is None:
            held_out_loader(trainer, _ERROR)  # it raises now, and not after the training

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Layers are still synchronized or simulated in this hook; Lightning reverts them when fit has ended.
        batches = batches_without_end(held_out_loader(trainer, _ERROR)) if self.batches is None else self.batches()
        embed = getattr(pl_module, "embed_views", None)
        found = getattr(pl_module, "found_partners", nearest_is_partner)
        ready = (prepared(trainer, pl_module, batch) for batch in batches)
        with trainer.precision_plugin.train_step_context():
            leak = measure_leak(pl_module, ready, self.num_batches, embed=embed, found=found)
        values = {"together": leak.together, "spread": leak.spread, "difference": leak.difference}
        self._result = {f"leak/{name}": value for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self._result, logged_step(trainer))
