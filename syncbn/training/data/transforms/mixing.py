"""Mixes the samples of a training batch: mixup and CutMix of torchvision.transforms.v2, with soft targets."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.data.transforms import torchvision_v2
from syncbn.training.errors import SettingError

DEFAULTS: dict[str, Any] = {
    "name": None,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "prob": 1.0,
    "switch_prob": 0.5,
    "off_epoch": None,
}


def check(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the defaults for those that are missing.

    Raises:
        SettingError: an unknown setting, or one that is out of its range; neither mixup nor CutMix is on.
    """
    for name, value in settings.items():
        if name not in DEFAULTS:
            known = ", ".join(each for each in DEFAULTS if each != "name")
            raise SettingError(f"mix.{name}", value, f"there is no such setting; use {known}")
    held = DEFAULTS | {name: value for name, value in settings.items() if value is not None}
    for name, high in (("mixup_alpha", None), ("cutmix_alpha", None), ("prob", 1), ("switch_prob", 1)):
        value = held[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value < 0 or (high is not None and value > high):
            raise SettingError(f"mix.{name}", value, f"use {'0 or more' if high is None else 'a probability, 0 to 1'}")
    if not (held["mixup_alpha"] or held["cutmix_alpha"]):
        hint = "mixup and CutMix are both off; use mix.mixup_alpha or mix.cutmix_alpha above 0, or mix=none"
        raise SettingError("mix.mixup_alpha", held["mixup_alpha"], hint)
    off = held["off_epoch"]
    if off is not None and (isinstance(off, bool) or not isinstance(off, int) or off < 0):
        raise SettingError("mix.off_epoch", off, "use an epoch, a whole number of 0 or more, or null")
    return held


class Mix:
    """Mixes each sample of a batch with its partner, by one ratio for the whole global batch.

    The partner of the sample at position p of a global batch of G samples is at p + G/2 (modulo G). Both are on the
    same rank whenever the ranks hold an even number of samples, so the mixed batch is the same on any number of ranks.
    Ratio, box and the choice between mixup and CutMix are drawn from torch's global generator, which the loader seeds
    by epoch and global batch, equally on all ranks.

    Args:
        settings: those of ``conf/mix``.
        num_classes: length of the soft targets.

    Raises:
        SettingError: see :func:`check`; torchvision is not installed.
    """

    def __init__(self, settings: dict[str, Any], num_classes: int) -> None:
        held = check(settings)
        v2 = torchvision_v2("mix", held["name"])
        self.num_classes, self.off_epoch = num_classes, held["off_epoch"]
        self.prob, self.switch_prob = held["prob"], held["switch_prob"]
        self.mixup = v2.MixUp(alpha=held["mixup_alpha"]) if held["mixup_alpha"] else None
        self.cutmix = v2.CutMix(alpha=held["cutmix_alpha"]) if held["cutmix_alpha"] else None

    def __call__(self, batch: Any, epoch: int) -> Any:
        """Return images and soft targets of shape ``(N, num_classes)``; a batch that is not mixed stays as it is.

        Args:
            batch: images of shape ``(N, C, H, W)`` and labels of shape ``(N,)``, N even.
            epoch: the data's epoch.
        """
        # All draws are made for every batch, so that none depends on the outcome of another.
        mixed, switched = torch.rand(2).tolist()
        if mixed >= self.prob or (self.off_epoch is not None and epoch >= self.off_epoch):
            return batch
        use_cutmix = self.mixup is None or (self.cutmix is not None and switched < self.switch_prob)
        images, labels = batch
        return self._mixed(self.cutmix if use_cutmix else self.mixup, images, labels)

    def _mixed(self, transform: Any, images: Tensor, labels: Tensor) -> list[Tensor]:
        # v2 mixes each sample with the one before it. Seen as two samples that hold half the batch each, sample p is
        # mixed with p + N/2.
        n, channels, height, width = images.shape
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        halves = images.reshape(2, n // 2 * channels, height, width), targets.reshape(2, -1)
        mixed, soft = transform(*halves)
        return [mixed.reshape(images.shape), soft.reshape(n, self.num_classes)]


def outputs(data: Any, classes: int) -> int:
    """The length of soft targets: the outputs of the network, which may be more than the data have classes.

    Args:
        data: a data module; the module in its trainer has ``num_classes``, or the classes are taken.
        classes: number of classes of the data.
    """
    module = None if data.trainer is None else data.trainer.lightning_module
    found = getattr(module, "num_classes", None)
    return max(found, classes) if isinstance(found, int) else classes


def check_batch(settings: Any, batch_size: int) -> None:
    """Raise a SettingError if a device holds an odd number of samples, whose partners would be on another device."""
    if settings is not None and batch_size % 2:
        hint = "mix pairs the samples that a device holds; use an even number, or mix=none"
        raise SettingError("data.batch_size", batch_size, hint)
