"""A part of an archive's images: by class, fixed by the seed, the same images in a smaller and a larger draw."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from syncbn.training import CIFAR
from syncbn.training.data.images import subset
from tests.support.refuses import refuses
from tests.training.data.test_image_archives import cifar10

UNEQUAL = [0] * 60 + [1] * 30 + [2] * 10


@pytest.mark.parametrize(
    ("count", "expected"), [(3, (1, 1, 1)), (10, (6, 3, 1)), (20, (12, 6, 2)), (50, (30, 15, 5)), (100, (60, 30, 10))]
)
def test_classes_keep_their_proportions(count: int, expected: tuple[int, ...]) -> None:
    drawn = subset.draw(UNEQUAL, count, 0, "train_images")
    assert len(set(drawn)) == count
    assert drawn == sorted(drawn)
    of_class = Counter(UNEQUAL[index] for index in drawn)
    assert tuple(of_class[label] for label in range(3)) == expected


def test_each_class_has_an_image_in_the_smallest_draw() -> None:
    labels = [0] * 1000 + [1]
    assert sorted(labels[index] for index in subset.draw(labels, 2, 0, "train_images")) == [0, 1]


def test_a_smaller_draw_is_part_of_a_larger_one_with_the_same_seed() -> None:
    draws = [set(subset.draw(UNEQUAL, count, 7, "train_images")) for count in range(3, 101)]
    assert all(small < large for small, large in pairwise(draws))
    assert subset.draw(UNEQUAL, 50, 7, "train_images") == sorted(draws[47])
    assert subset.draw(UNEQUAL, 50, 8, "train_images") != sorted(draws[47])
    assert subset.draw(UNEQUAL, None, 7, "train_images") == list(range(100))


def test_images_are_drawn_after_validation_is_split_off(tmp_path: Path) -> None:
    """Validation is that of all training images, and the drawn images are some of the rest, with their labels."""
    cifar10(tmp_path)
    settings = {"num_classes": 2, "val_fraction": 0.2}
    whole, part = (
        CIFAR(str(tmp_path), 2, **settings),
        CIFAR(str(tmp_path), 2, train_images=6, test_images=2, **settings),
    )
    for data in (whole, part):
        data.setup("fit")
    assert [len(part.labels(name)) for name in ("train", "val", "test")] == [6, 4, 2]
    assert part.class_counts == [3, 3]
    assert sorted(part.labels("test")) == [0, 1]
    assert torch.equal(part._parts["val"][0], whole._parts["val"][0])
    for name in ("train", "test"):
        images, labels = whole._parts[name]
        found = [int((images == each).flatten(1).all(1).nonzero()) for each in part._parts[name][0]]
        assert found == sorted(found)
        assert labels[found].tolist() == part.labels(name)
    mean, _ = part.measure()
    assert mean == pytest.approx((part._parts["train"][0].double() / 255).mean((0, 2, 3)).tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["train_images", "test_images"])
def test_numbers_of_images_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    cifar10(tmp_path)
    for count in (0, -1, True, 1.5):
        with refuses(f"data.{name}", count, "use a whole number, 1 or more"):
            CIFAR(str(tmp_path), **{name: count})
    there = {"train_images": 16, "test_images": 4}[name]
    for count in (1, there + 1):
        data = CIFAR(str(tmp_path), num_classes=2, val_fraction=0.2, **{name: count})
        with refuses(f"data.{name}", count, f"there are {there} images in 2 classes; use 2 to {there}, or null"):
            data.setup("fit")
