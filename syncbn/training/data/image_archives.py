"""The data modules of CIFAR-10, CIFAR-100 and MNIST-like archives, which are read into memory."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from syncbn.training.data.image_data import ImageData, ImageSet
from syncbn.training.data.images import archive_sources, archives, listing, statistics, subset
from syncbn.training.data.images.archives import Part
from syncbn.training.data.transforms.augmentation import Augmentation
from syncbn.training.errors import SettingError


class ImageArchive(ImageData):
    """Base of data sets that come with a training and a test part; validation is split off the training part, by class.

    Args:
        root: where the archive is; its type is that of the subclass.
        batch_size: samples per device and step.
        train_images: how many images to train on, drawn by class with ``split_seed`` after validation is split off;
            None for all.
        test_images: how many images to test on, drawn in the same way; None for all.
        settings: see :class:`.image_data.ImageData`.

    Raises:
        SettingError: the archive is missing or damaged; ``num_classes`` or ``in_channels`` are not those of the data;
            more images than there are, or fewer than there are classes.
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int = 32,
        *,
        train_images: int | None = None,
        test_images: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        listing.check_fractions(self.val_fraction)
        subset.check("train_images", train_images)
        subset.check("test_images", test_images)
        self.root, self.train_images, self.test_images = root, train_images, test_images
        self._parts: dict[str, Part] = {}

    def read(self, root: str) -> tuple[Part, Part, list[str]]:
        """The training part, the test part and the names of the classes."""
        raise NotImplementedError

    def load(self) -> None:
        if self.root is None:
            raise SettingError("data.root", None, f"it is missing; use the directory of the archive ({self.source()})")
        (images, labels), (test_images, test_labels), self.classes = self.read(str(self.root))
        numbered = [(f"{index:08d}", int(label)) for index, label in enumerate(labels)]
        parts = listing.split(
            numbered, self.val_fraction, self.split_seed, "", ("data.val_fraction", self.val_fraction)
        )
        train, val = ([int(name) for name, _ in part] for part in parts)
        train = self._drawn(labels, train, self.train_images, "train_images")
        test = self._drawn(test_labels, range(len(test_labels)), self.test_images, "test_images")
        self._parts = {part: (images[taken], labels[taken]) for part, taken in (("train", train), ("val", val))}
        self._parts["test"] = (test_images[test], test_labels[test])
        if self.in_channels not in (None, channels := images.shape[1]):
            raise SettingError("data.in_channels", self.in_channels, f"the images have {channels}; leave it out")

    def _drawn(self, labels: Tensor, indices: Sequence[int], count: int | None, name: str) -> list[int]:
        kept = subset.draw(labels[list(indices)].tolist(), count, self.split_seed, name)
        return [indices[each] for each in kept]

    def source(self) -> str:
        """Where to get the archive."""
        raise NotImplementedError

    def labels(self, part: str) -> Sequence[int]:
        return self._parts[part][1].tolist()

    def image_set(self, part: str) -> ImageSet:
        images, labels = self._parts[part]
        size = (images.shape[2], images.shape[3])
        augment = None if self.augment is None or part != "train" else Augmentation(self.augment, size)
        return ImageSet(images.__getitem__, labels.tolist(), self.normalize(), augment)

    def measure(self) -> tuple[list[float], list[float]]:
        return statistics.of_tensor(self._parts["train"][0])

    def state_dict(self) -> dict[str, Any]:
        # The size is for syncbn.load: other images are scaled to it.
        return super().state_dict() | ({"size": list(self._parts["train"][0].shape[2:])} if self._ready else {})


class CIFAR(ImageArchive):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): colour images of shape ``(3, 32, 32)``, from the python archive.

    Args:
        root: directory with ``cifar-10-python.tar.gz`` (or ``cifar-100-python.tar.gz``), or with the extracted folder;
            that folder; or the archive.
        batch_size: samples per device and step.
        name: "cifar10" or "cifar100".
        settings: ``train_images`` and ``test_images``, how many images of these parts to use, drawn by class with
            ``split_seed`` (None for all); and those of :class:`.image_data.ImageData`.
    """

    def __init__(self, root: str | None, batch_size: int = 32, *, name: str = "cifar10", **settings: Any) -> None:
        super().__init__(root, batch_size, **settings)
        self.archive = name

    def read(self, root: str) -> tuple[Part, Part, list[str]]:
        return _cifar(root, self.archive)

    def source(self) -> str:
        return archive_sources.cifar(self.archive)


class MNIST(ImageArchive):
    """Grey images in MNIST's format (LeCun et al. 1998): MNIST, Fashion-MNIST, KMNIST, EMNIST.

    Args:
        root: directory with the four idx files, each with ``.gz`` or without.
        batch_size: samples per device and step.
        num_classes: number of classes.
        classes: their names; None for their numbers.
        settings: ``train_images`` and ``test_images``, how many images of these parts to use, drawn by class with
            ``split_seed`` (None for all); and those of :class:`.image_data.ImageData`.
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int = 32,
        *,
        num_classes: int = 10,
        classes: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, batch_size, num_classes=num_classes, **settings)
        self.names = (
            [str(label) for label in range(num_classes)] if classes is None else [str(each) for each in classes]
        )

    def read(self, root: str) -> tuple[Part, Part, list[str]]:
        train, test = _idx(root)
        highest = max(int(labels.max()) for _, labels in (train, test))
        if highest >= len(self.names):
            hint = f"the labels go up to {highest}; use data.num_classes={highest + 1}"
            raise SettingError("data.num_classes", len(self.names), hint)
        return train, test, self.names

    def source(self) -> str:
        return archive_sources.MNIST


@cache
def _cifar(root: str, name: str) -> tuple[Part, Part, list[str]]:
    """The test of a run has a data module of its own, so the images are kept."""
    return archives.cifar(root, name)


@cache
def _idx(root: str) -> tuple[Part, Part]:
    return archives.idx(root, archive_sources.MNIST)
