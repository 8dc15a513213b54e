"""Domain shards: each device its own part of the training images, of its own labels, brightness or polarity.

What a federation of hospitals has, or a data set that is stored by class, and where per-device batch norm fails for
another reason than small batches: no device sees what the others normalize by (protocol of Ioffe 2017, section 4.3,
with labels).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from syncbn.training.errors import SettingError

SHARDS = ("labels", "brightness", "inversion")
BRIGHTEST = 0.8  # what the last shard is brightened by, of images in [0, 1]


@dataclass
class ShardBatch:
    """A batch to evaluate on. It unpacks into images and labels, as any other, and says which shard each is of.

    Attributes:
        images: shape ``(N, *)``.
        labels: shape ``(N,)``.
        shards: shape ``(N,)``, 0 to the number of shards less 1.
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
    """Refuses what gives no shards.

    Raises:
        SettingError: another word; one shard alone, or none; a number without a word.
    """
    if shards is None:
        if num_shards is not None:
            raise SettingError("data.num_shards", num_shards, f"data.shards is null; use data.shards={_words()}")
        return
    if shards not in SHARDS:
        raise SettingError("data.shards", shards, f"use {_words()}, or null")
    if num_shards is None or num_shards < 2:
        raise SettingError(
            f"data.shards={shards} with data.num_shards",
            num_shards,
            "shards differ from each other; use two or more devices (trainer.devices=2, simulate=2)",
        )


def train_shards(shards: str, num_shards: int, data: TensorDataset) -> tuple[TensorDataset, list[list[int]]]:
    """The training images as their devices have them, and the indices of each shard's.

    Args:
        shards: "labels": the classes are cut into consecutive groups. "brightness", "inversion": images are dealt in
            turn, and look as :func:`seen_in` says.
        num_shards: how many.
        data: images of shape ``(N, *)``, labels of shape ``(N,)``.

    Raises:
        SettingError: fewer classes than shards.
    """
    x, y = data.tensors
    of = _label_groups(y, num_shards) if shards == "labels" else torch.arange(len(y)) % num_shards
    x = x.clone()
    for shard in range(num_shards):
        x[of == shard] = seen_in(shards, shard, num_shards, x[of == shard])
    return TensorDataset(x, y), [(of == shard).nonzero().flatten().tolist() for shard in range(num_shards)]


def evaluation_shards(shards: str, num_shards: int, data: TensorDataset) -> TensorDataset:
    """Every image in every domain, with the domain's number; for labels every image once, with its group's."""
    x, y = data.tensors
    if shards == "labels":
        return TensorDataset(x, y, _label_groups(y, num_shards))
    domains = [seen_in(shards, shard, num_shards, x) for shard in range(num_shards)]
    return TensorDataset(torch.cat(domains), y.repeat(num_shards), torch.arange(num_shards).repeat_interleave(len(y)))


def seen_in(shards: str, shard: int, num_shards: int, images: Tensor) -> Tensor:
    """Images in [0, 1] as a shard has them: brightened by ``0.8 * shard / (num_shards - 1)``; inverted if it is odd."""
    if shards == "brightness":
        return images + BRIGHTEST * shard / (num_shards - 1)
    return 1 - images if shards == "inversion" and shard % 2 else images


def collate(samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> ShardBatch:
    """Samples of :func:`evaluation_shards` as a batch."""
    return ShardBatch(*default_collate(list(samples)))


def _label_groups(labels: Tensor, num_shards: int) -> Tensor:
    classes = int(labels.max()) + 1
    if classes < num_shards:
        raise SettingError(
            "data.shards", "labels", f"{classes} classes cannot fill {num_shards} shards; use at most {classes} devices"
        )
    return labels * num_shards // classes


def _words() -> str:
    return f"{', '.join(SHARDS[:-1])} or {SHARDS[-1]}"
