"""A callback that records every prediction of a test, and the images with the highest loss, over all ranks."""

from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.metrics.predictions import predictions

WORST = 24  # images that are kept


class Mistakes(NamedTuple):
    """Wrongly predicted images, with the highest loss first; every field has one entry for each of them."""

    losses: Tensor
    true: Tensor
    predicted: Tensor
    probabilities: Tensor  # of the predicted class
    images: Tensor  # (N, C, H, W), as the network got them


class PredictionRecord(pl.Callback):
    """Records a test of a classification.

    It needs what ``test_step`` returns (:mod:`syncbn.training.metrics.predictions`); the built-in Classifier returns
    it. Otherwise nothing is recorded. With ``exact_loader`` every image is recorded once, on exactly one rank.

    Attributes:
        pairs: true and predicted class of each sample of all ranks, shape ``(N, 2)``; None if nothing was recorded.
            On rank 0 only, as the next ones.
        classes: number of classes.
        mistakes: the ``WORST`` mistakes over all ranks; None if there is none, or the samples are no images.
    """

    def __init__(self) -> None:
        self.pairs: Tensor | None = None
        self.classes = 0
        self.mistakes: Mistakes | None = None
        self._pairs: list[Tensor] = []
        self._mistakes: Mistakes | None = None

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        found = predictions(outputs)
        if found is None or found.scores is None:
            return
        scores, target = found.scores.float(), found.target
        self.classes, predicted = scores.shape[1], scores.argmax(1)
        images, labelled = _images(batch, len(target)), (target >= 0) & (target < self.classes)
        if not labelled.all():  # such as -100, which torch's cross_entropy ignores
            scores, target, predicted = scores[labelled], target[labelled], predicted[labelled]
            images = None if images is None else images[labelled]
        self._pairs.append(torch.stack([target, predicted], 1))
        if images is None:
            return
        wrong = (predicted != target).nonzero()[:, 0]
        losses = F.cross_entropy(scores, target, reduction="none")
        probabilities = scores.softmax(1).gather(1, predicted[:, None])[:, 0]
        new = Mistakes(*(each[wrong] for each in (losses, target, predicted, probabilities, images)))
        self._mistakes = _worst([*([self._mistakes] if self._mistakes is not None else []), new])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pairs = torch.cat(self._pairs).cpu() if self._pairs else None
        mistakes = None if self._mistakes is None else Mistakes(*(each.cpu() for each in self._mistakes))
        self._pairs, self._mistakes = [], None
        gathered = _gather((pairs, mistakes), trainer)
        recorded = [each for each, _ in gathered if each is not None]
        images = [each for _, each in gathered if each is not None and len(each.losses)]
        self.pairs = torch.cat(recorded) if recorded else None
        self.mistakes = _worst(images) if images else None


def _gather(mine: Any, trainer: pl.Trainer) -> list[Any]:
    """What each rank has, on rank 0; empty on the others."""
    if trainer.world_size == 1:
        return [mine]
    ranks: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    dist.gather_object(mine, ranks, dst=0)
    return ranks or []


def _worst(parts: list[Mistakes]) -> Mistakes:
    """Those with the highest losses; a loss that is NaN counts as the highest."""
    if len(parts) == 1 and len(parts[0].losses) <= WORST:
        return parts[0]
    size = parts[0].images.shape[1:]
    parts = [each if each.images.shape[1:] == size else _resized(each, size) for each in parts]
    joined = Mistakes(*(torch.cat(each) for each in zip(*parts, strict=True)))
    order = joined.losses.nan_to_num(nan=float("inf")).argsort(descending=True, stable=True)[:WORST]
    return Mistakes(*(each[order] for each in joined))


def _resized(mistakes: Mistakes, size: torch.Size) -> Mistakes:
    """Images of batches of another size, in the size and the number of channels of the first."""
    images = F.interpolate(mistakes.images, size[1:]).mean(1, keepdim=True).expand(-1, size[0], -1, -1)
    return mistakes._replace(images=images)


def _images(batch: Any, number: int) -> Tensor | None:
    """The images of a batch: its first part, grey or colour; None for data of another kind."""
    images = batch[0] if isinstance(batch, tuple | list) and batch else None
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) != number:
        return None
    return images.detach().float()
