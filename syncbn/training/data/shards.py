"""Domain shards: the devices' training images differ in labels, brightness or polarity.

Such data occur in a federation of hospitals, or in a data set that is stored class by class. Per-device batch norm
fails there for another reason than small batches: the statistics of one device do not fit the data of the others
(Ioffe 2017, section 4.3, uses this protocol with labels).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from syncbn.training.errors import SettingError

SHARDS = ("labels", "brightness", "inversion")
MAX_BRIGHTENING = 0.8  # added to the images of the last shard, which are in [0, 1]


@dataclass
class ShardBatch:
    """A batch for evaluation. It unpacks into images and labels like a tuple, and also has the shard of each image.

    Attributes:
        images: shape ``(N, *)``.
        labels: shape ``(N,)``.
        shards: shape ``(N,)``, 0 to the number of shards minus 1.
    """

    images: Tensor
    labels: Tensor
    shards: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.images, self.labels))

    def __getitem__(self, index: int) -> Tensor:
        return (self.images, self.labels)[index]

    def __len__(self) -> int:
        return 2


def check(shards: str | None, num_shards: int | None) -> None:
    """Raise a SettingError for an unknown kind, fewer than two shards, or a number of shards without a kind."""
    if shards is None:
        if num_shards is not None:
            raise SettingError("data.num_shards", num_shards, f"data.shards is null; use data.shards={_choices()}")
        return
    if shards not in SHARDS:
        raise SettingError("data.shards", shards, f"use {_choices()}, or null")
    if num_shards is None or num_shards < 2:
        raise SettingError(
            f"data.shards={shards} with data.num_shards",
            num_shards,
            "shards differ from each other; use two or more devices (trainer.devices=2, simulate=2)",
        )


def train_shards(shards: str, num_shards: int, data: TensorDataset) -> tuple[TensorDataset, list[list[int]]]:
    """Assign each training image to a shard and transform it as the shard requires.

    Args:
        shards: "labels": the classes are split into consecutive groups. "brightness", "inversion": image i is in shard
            i modulo ``num_shards``, transformed by :func:`to_domain`.
        num_shards: number of shards.
        data: images of shape ``(N, *)``, labels of shape ``(N,)``.

    Returns:
        The transformed data, and for each shard the list of its indices.

    Raises:
        SettingError: fewer classes than shards.
    """
    x, y = data.tensors
    shard_of = _label_groups(y, num_shards) if shards == "labels" else torch.arange(len(y)) % num_shards
    x = x.clone()
    for shard in range(num_shards):
        x[shard_of == shard] = to_domain(shards, shard, num_shards, x[shard_of == shard])
    return TensorDataset(x, y), [(shard_of == shard).nonzero().flatten().tolist() for shard in range(num_shards)]


def evaluation_shards(shards: str, num_shards: int, data: TensorDataset) -> TensorDataset:
    """Return every image in every domain, with the domain's number as third tensor.

    With "labels", every image is there once, with the number of its label group.
    """
    x, y = data.tensors
    if shards == "labels":
        return TensorDataset(x, y, _label_groups(y, num_shards))
    domains = [to_domain(shards, shard, num_shards, x) for shard in range(num_shards)]
    return TensorDataset(torch.cat(domains), y.repeat(num_shards), torch.arange(num_shards).repeat_interleave(len(y)))


def to_domain(shards: str, shard: int, num_shards: int, images: Tensor) -> Tensor:
    """Transform images in [0, 1] into the domain of a shard.

    "brightness" adds ``0.8 * shard / (num_shards - 1)``; "inversion" inverts the images of odd shards; "labels" changes
    nothing.
    """
    if shards == "brightness":
        return images + MAX_BRIGHTENING * shard / (num_shards - 1)
    return 1 - images if shards == "inversion" and shard % 2 else images


def collate(samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> ShardBatch:
    """Make a batch of samples of :func:`evaluation_shards`."""
    return ShardBatch(*default_collate(list(samples)))


def _label_groups(labels: Tensor, num_shards: int) -> Tensor:
    """The shard of each label: the classes are split into ``num_shards`` consecutive groups."""
    classes = int(labels.max()) + 1
    if classes < num_shards:
        raise SettingError(
            "data.shards", "labels", f"{classes} classes cannot fill {num_shards} shards; use at most {classes} devices"
        )
    return labels * num_shards // classes


def _choices() -> str:
    return f"{', '.join(SHARDS[:-1])} or {SHARDS[-1]}"
