"""The LightningDataModule of two views of scikit-learn's digits, for contrastive learning."""

from typing import Any

from torch.utils.data import DataLoader

from syncbn.training.data.contrastive.views import clean_loader
from syncbn.training.data.digits import Digits
from syncbn.training.data.loaders import exact_loader, train_loader
from syncbn.training.data.transforms.digit_augmentation import DigitAugmentation, Drawn
from syncbn.training.errors import SettingError


class DigitViews(Digits):
    """Two views of each of scikit-learn's handwritten digits, of shape ``(1, 8, 8)``.

    Batches of training and validation are ``(view_1, view_2, label)``. The random draws of a training image depend on
    ``seed``, the epoch and the image only; those of a validation image are always the same. Test images are not
    augmented.

    Args:
        batch_size: images per device and step; each has two views.
        strength: of the augmentation; see :class:`.transforms.digit_augmentation.DigitAugmentation`.
        settings: ``val_fraction``, ``test_fraction``, ``split_seed``, ``shuffle``, ``seed``, ``num_workers``,
            ``remainder``, ``num_classes`` and ``in_channels`` of :class:`~syncbn.training.data.digits.Digits`, and
            further arguments of :func:`~syncbn.training.data.loaders.loader_options`.

    Raises:
        SettingError: as for Digits; a strength below 0.
    """

    def __init__(self, batch_size: int = 32, *, strength: float = 1.0, **settings: Any) -> None:
        for name in ("shards", "corruption", "label_noise", "outliers", "augment", "mix", "balance"):
            if settings.get(name):
                raise SettingError(f"data.{name}", settings[name], "data=digit_views do not take it; leave it out")
        super().__init__(batch_size, **settings)
        self.views = DigitAugmentation(strength)

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(
            Drawn(self.train),
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            remainder=self.remainder,
            collate_fn=self.views,
            **self.options,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return exact_loader(Drawn(self.val), self.batch_size, collate_fn=self.views, **self.options)

    def clean_train_dataloader(self) -> DataLoader[Any]:
        """All training images with their labels, without augmentation, in the order of the data set."""
        return clean_loader(self.train)
