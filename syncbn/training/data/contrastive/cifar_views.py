"""The LightningDataModule of two views of CIFAR's images, for contrastive learning."""

from typing import Any

from torch.utils.data import DataLoader

from syncbn.training.data.contrastive.views import TwoViews, clean_loader
from syncbn.training.data.image_archives import CIFAR
from syncbn.training.data.image_data import ImageSet
from syncbn.training.data.transforms.augmentation import Augmentation
from syncbn.training.errors import SettingError


class CIFARViews(CIFAR):
    """Two views of each image of CIFAR-10 or CIFAR-100, of shape ``(3, 32, 32)``.

    Batches of training and validation are ``(view_1, view_2, label)``, each view augmented as ``augment`` says. The
    random draws of a training image depend on ``seed``, the epoch and the image only; those of a validation image are
    always the same. Test images are not augmented.

    Args:
        settings: see :class:`~syncbn.training.data.image_archives.CIFAR`; ``augment`` is needed.

    Raises:
        SettingError: as for CIFAR; no ``augment``; ``mix`` or ``balance``.
    """

    def __init__(self, *args: Any, augment: dict[str, Any] | None = None, **settings: Any) -> None:
        if augment is None:
            hint = "both views of an image would be equal; use augment=simclr, or another augmentation"
            raise SettingError("augment", None, hint)
        for name in ("mix", "balance"):
            if settings.get(name):
                raise SettingError(f"data.{name}", settings[name], "two views do not take it; leave it out")
        super().__init__(*args, augment=augment, **settings)

    def image_set(self, part: str) -> Any:
        images, labels = self._parts[part]
        if part == "test":
            return ImageSet(images.__getitem__, labels.tolist(), self.normalize())
        assert self.augment is not None
        augment = Augmentation(self.augment, (images.shape[2], images.shape[3]))
        return TwoViews(ImageSet(images.__getitem__, labels.tolist(), self.normalize(), augment))

    def clean_train_dataloader(self) -> DataLoader[Any]:
        """All training images with their labels, without augmentation, in the order of the data set."""
        self.settle_statistics()
        images, labels = self._parts["train"]
        return clean_loader(ImageSet(images.__getitem__, labels.tolist(), self.normalize()))
