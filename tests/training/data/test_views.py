"""Two views of each image: what their random draws depend on, and which images are left as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn.training import CIFARViews, Digits, DigitViews
from syncbn.training.data.contrastive import cifar_views
from syncbn.training.data.transforms.digit_augmentation import DRAWS, DigitAugmentation
from tests.support.refuses import refuses
from tests.training.data.test_image_archives import cifar10
from tests.training.support.settled_config import settled

Views = dict[bytes, tuple[Tensor, Tensor, int]]


def data(batch_size: int = 8, **settings: Any) -> DigitViews:
    made = DigitViews(batch_size, val_fraction=0.05, test_fraction=0.9, **settings)
    made.setup("fit")
    return made


def by_image(loader: Any, epoch: int = 0) -> list[tuple[Tensor, Tensor, int]]:
    """The samples of an epoch, in an order that does not depend on that of the epoch."""
    if hasattr(loader.sampler, "set_position"):
        loader.sampler.set_position(epoch, 0)
    samples = [sample for batch in loader for sample in zip(*batch, strict=True)]
    return sorted(samples, key=lambda each: each[0].flatten().tolist())


def same(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) for pair in zip(one, two, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_draws_depend_on_seed_epoch_and_sample_only() -> None:
    views = by_image(data(8, remainder="pad").train_dataloader())[:1]
    whole = by_image(data(8, seed=3, remainder="uneven").train_dataloader())
    torch.rand(1)
    assert same(whole, by_image(data(5, seed=3, remainder="uneven").train_dataloader()))
    assert not same(whole, by_image(data(8, seed=4, remainder="uneven").train_dataloader()))
    assert not same(whole, by_image(data(8, seed=3, remainder="uneven").train_dataloader(), epoch=1))
    first, second, _ = views[0]
    assert first.shape == second.shape == (1, 8, 8)
    assert not torch.equal(first, second)


def test_validation_has_the_same_views_each_time_and_for_each_seed() -> None:
    loader = data(8).val_dataloader()
    assert same(by_image(loader), by_image(loader))
    assert same(by_image(loader), by_image(data(3, seed=9).val_dataloader()))


def test_test_images_and_those_of_the_probe_are_those_of_digits() -> None:
    views, digits = data(), Digits(8, val_fraction=0.05, test_fraction=0.9)
    digits.setup("fit")
    for loader, part in ((views.test_dataloader(), digits.test), (views.clean_train_dataloader(), digits.train)):
        images, labels = (torch.cat(each) for each in zip(*loader, strict=True))
        assert torch.equal(images, part.tensors[0])
        assert torch.equal(labels, part.tensors[1])


def test_a_strength_of_zero_leaves_images_as_they_are() -> None:
    views = data(strength=0.0)
    (first, second, labels), *_ = views.train_dataloader()
    images, known = views.train.tensors
    for image, other, label in zip(first, second, labels, strict=True):
        torch.testing.assert_close(image, other)
        found = (images - image).abs().amax((1, 2, 3)).argmin()
        torch.testing.assert_close(images[found], image)
        assert known[found] == label


def test_each_draw_changes_what_it_is_for() -> None:
    """0.5 is the middle of each range, 1 its end."""
    images, no_noise = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    images[:, :, 3:5, 2:4] = 0.5
    augment = DigitAugmentation()

    def view(**draws: float) -> Tensor:
        uniform = torch.full((2, DRAWS), 0.5)
        for name, value in draws.items():
            uniform[0, ("x", "y", "angle", "scale", "contrast", "brightness").index(name)] = value
        found = augment.view(images, uniform, no_noise)
        torch.testing.assert_close(found[1], images[1])  # the other image has its own draws
        return found[0]

    torch.testing.assert_close(view(x=1.0), images[0].roll(-1, 2))
    torch.testing.assert_close(view(y=0.0), images[0].roll(1, 1))
    torch.testing.assert_close(view(contrast=1.0), images[0] * torch.tensor(0.4).exp())
    torch.testing.assert_close(view(brightness=0.0), images[0] - 0.2)
    assert view(scale=1.0).sum() < images[0].sum() < view(scale=0.0).sum()
    assert not torch.allclose(view(angle=1.0), images[0])
    torch.testing.assert_close(augment.view(images, torch.full((2, DRAWS), 0.5), no_noise + 1), images + 0.1)


class Random:
    """In place of torchvision's transforms, which are an extra."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, image: Tensor, normalize: Any) -> Tensor:
        return normalize(image) + torch.rand(1)


def test_cifar_has_two_views_and_a_clean_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_views, "Augmentation", Random)
    root = str(cifar10(tmp_path))
    made = CIFARViews(root, 4, val_fraction=0.2, augment={"hflip": 0.5}, mean=[0.0] * 3, std=[1.0] * 3)
    made.setup("fit")
    for loader in (made.train_dataloader(), made.val_dataloader()):
        first, second, labels = next(iter(loader))
        assert first.shape == second.shape == (len(labels), 3, 32, 32)
        difference = (second - first).flatten(1)
        assert (difference - difference[:, :1]).abs().max() < 1e-6  # the same image, and another draw
        assert difference[:, 0].unique().numel() == len(labels)
    images, labels = (torch.cat(each) for each in zip(*made.clean_train_dataloader(), strict=True))
    expected = made._parts["train"]
    torch.testing.assert_close(images, expected[0] / 255)
    assert torch.equal(labels, expected[1].long())
    image, _ = next(iter(made.test_dataloader()))
    torch.testing.assert_close(image, made._parts["test"][0][: len(image)] / 255)


def test_settings_that_cannot_work_are_refused() -> None:
    with refuses("augment", None, "augment=simclr"):
        CIFARViews("nowhere")
    with refuses("data.mix", {"name": "mixup"}, "leave it out"):
        CIFARViews("nowhere", augment={"hflip": 0.5}, mix={"name": "mixup"})
    with refuses("data.shards", "labels", "leave it out"):
        DigitViews(shards="labels")
    with refuses("data.strength", -1, "0 or more"):
        settled("experiment=simclr", "data.strength=-1")
    with refuses("data.root", None, "it is missing"):
        settled("experiment=simclr", "data=cifar10_views", "model=resnet")
