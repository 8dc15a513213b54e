"""Mosaics of CIFAR's photographs: each quadrant is a photograph with its label, drawn by seed, epoch and sample."""

import pytest
import torch
from torch import Tensor

from syncbn.training import CIFARMosaics
from tests.support.refuses import refuses
from tests.training.data.test_image_archives import cifar10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("cifar")
    cifar10(where, classes=3, images=6)
    return str(where)


def mosaics(root: str, batch: int = 4, **settings: int) -> CIFARMosaics:
    data = CIFARMosaics(root, batch, num_classes=3, val_fraction=0.2, mean=[0.5] * 3, std=[0.25] * 3, **settings)
    data.setup("fit")
    return data


def epoch(data: CIFARMosaics, number: int = 0) -> tuple[Tensor, Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_position(number, 0)
    images, masks = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(masks)


def quadrants(each: Tensor) -> list[Tensor]:
    return [each[..., y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_each_quadrant_is_a_photograph_of_the_part_with_its_label(root: str, part: str) -> None:
    data = mosaics(root, batch=2)
    loader = data.train_dataloader() if part == "train" else data.test_dataloader()
    photographs, labels = data._parts[part]
    known = (photographs.float() / 255 - 0.5) / 0.25
    shown = []
    for images, masks in loader:
        assert (images.shape[1:], images.dtype) == ((3, 64, 64), torch.float32)
        assert (masks.shape[1:], masks.dtype) == ((64, 64), torch.int64)
        for image, mask in zip(images, masks, strict=True):
            found = []
            for photograph, label in zip(quadrants(image), quadrants(mask), strict=True):
                (index,) = (known - photograph).abs().flatten(1).amax(1).lt(1e-5).nonzero().flatten().tolist()
                assert label.unique().tolist() == [labels[index]]
                found.append(index)
            shown.append(found)
    assert len(shown) == len(labels)
    if part == "test":  # in order, so mosaic n is around photograph n
        assert len({found.index(number) for number, found in enumerate(shown)}) > 1
    assert set.union(*map(set, shown)) == set(range(len(labels)))


def test_mosaics_depend_on_seed_epoch_and_sample_and_not_on_the_batch_size(root: str) -> None:
    images, masks = epoch(mosaics(root, batch=4, seed=3))
    again, same = epoch(mosaics(root, batch=8, seed=3))
    assert torch.equal(images, again)
    assert torch.equal(masks, same)
    assert not torch.equal(images, epoch(mosaics(root, batch=4, seed=4))[0])
    first, second = (epoch(mosaics(root, batch=4, seed=3, shuffle=False), number)[1] for number in (0, 1))
    assert not torch.equal(first, second)


def test_the_mosaics_of_the_test_are_fixed(root: str) -> None:
    def tested(seed: int, batch: int) -> tuple[Tensor, Tensor]:
        images, masks = zip(*mosaics(root, batch=batch, seed=seed).test_dataloader(), strict=True)
        return torch.cat(images), torch.cat(masks)

    torch.manual_seed(5)
    one, (two, masks) = tested(0, 2), tested(1, 3)
    assert torch.equal(one[0], two)
    assert torch.equal(one[1], masks)


def test_a_part_of_the_photographs_makes_as_many_mosaics(root: str) -> None:
    data = mosaics(root, batch=2, train_images=12, test_images=4)
    assert len(data.train_dataloader()) * 2 == 12
    assert len(data.test_dataloader()) * 2 == 4
    assert data.state_dict()["size"] == [64, 64]
    with refuses("data.train_images", 99):
        mosaics(root, train_images=99)
