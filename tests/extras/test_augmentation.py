"""Augmentation and mixing with torchvision: seeded by sample, and the same on any number of ranks."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from syncbn.training import Digits, ImageFolder
from syncbn.training.data import image_folder, loaders
from syncbn.training.data.transforms.augmentation import Augmentation
from syncbn.training.data.transforms.mixing import Mix, outputs
from tests.support.refuses import refuses
from tests.training.data.support.pictures import pictures

STRONG = {"padding": 2, "hflip": 0.5, "auto_augment": "randaugment", "reprob": 0.5, "color_jitter": 0.2}
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.8}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return pictures(tmp_path / "x", {"train/a": 9, "train/b": 9, "train/c": 4, "val/a": 1, "val/b": 1, "val/c": 1})


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The batches of one epoch on a rank, without a process group."""

    def batches(data: Any, ranks: int, rank: int, epoch: int = 1, start: int = 0) -> list[Any]:
        monkeypatch.setattr(loaders, "world_size", lambda: ranks)
        monkeypatch.setattr(loaders, "this_rank", lambda: rank)
        loader = data.train_dataloader()
        loader.sampler.set_position(epoch, start)
        return list(loader)

    return batches


def folder(root: Path, **settings: Any) -> ImageFolder:
    data = ImageFolder(str(root), **{"batch_size": 8, "seed": 3, **settings})
    data.setup("fit")
    return data


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remainder", ["drop", "uneven"])
def test_augmented_and_mixed_batches_are_those_of_one_process(
    root: Path, on: Any, workers: int, remainder: str
) -> None:
    """Bitwise: with workers, on 2 ranks, with a cache, and from the middle of an epoch."""
    settings: dict[str, Any] = {"augment": STRONG, "mix": BOTH, "remainder": remainder}
    whole = on(folder(root, **settings), 1, 0)
    assert len(whole) == (2 if remainder == "drop" else 3)
    assert not same(whole, on(folder(root, **settings), 1, 0, epoch=2))
    options = {"num_workers": workers, "cache": 0.001} if workers else {}
    assert same(on(folder(root, **settings, **options), 1, 0, start=1), whole[1:])
    shares = [on(folder(root, **settings, **options | {"batch_size": 4}), 2, rank) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, part in enumerate(parts):
            assert all(torch.equal(mine, all_[rank::2]) for mine, all_ in zip(part, batch, strict=True))


def test_a_smaller_last_batch_keeps_its_labels(root: Path, on: Any) -> None:
    (*_, last) = on(folder(root, mix=BOTH | {"prob": 1.0}, remainder="uneven"), 1, 0)
    assert last[1].dtype == torch.int64
    assert len(last[1]) == 6


@pytest.mark.parametrize(("kind", "alpha"), [("mixup", "mixup_alpha"), ("cutmix", "cutmix_alpha")])
def test_a_batch_of_two_is_mixed_as_torchvision_does(kind: str, alpha: str) -> None:
    images, labels = torch.rand(2, 3, 8, 6), torch.tensor([0, 2])
    theirs = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](alpha=0.7, num_classes=3)
    torch.manual_seed(5)
    torch.rand(2)  # whether and how
    expected = theirs(images, labels)
    torch.manual_seed(5)
    found = Mix({alpha: 0.7}, 3)([images, labels], 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mixing_pairs_a_sample_with_the_one_half_a_batch_away() -> None:
    images = torch.arange(6.0).reshape(6, 1, 1, 1)
    torch.manual_seed(0)
    mixed, soft = Mix({"mixup_alpha": 1.0}, 6)([images, torch.arange(6)], 0)
    share = soft[0, 0].item()
    assert 0 < share < 1
    for i in range(6):
        partner = (i + 3) % 6
        assert mixed[i].item() == pytest.approx(share * i + (1 - share) * partner)
        assert soft[i, i].item() == pytest.approx(share)
        assert soft[i, partner].item() == pytest.approx(1 - share)


def test_mixing_ends_with_an_epoch_and_takes_a_share_of_the_batches() -> None:
    batch = [torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])]
    off = Mix({"mixup_alpha": 1.0, "off_epoch": 2}, 2)
    assert off(batch, 2) is batch
    assert off(batch, 1) is not batch
    torch.manual_seed(0)
    some = Mix({"mixup_alpha": 1.0, "prob": 0.25}, 2)
    share = sum(some(batch, 0) is not batch for _ in range(400)) / 400
    assert 0.18 < share < 0.32


def test_soft_targets_are_as_long_as_the_network_has_outputs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "world_size", lambda: 1)
    monkeypatch.setattr(loaders, "this_rank", lambda: 0)
    module = SimpleNamespace(num_classes=12, accepts_soft_targets=True)
    trainer = SimpleNamespace(lightning_module=module, is_global_zero=True)
    for data in (folder(root, mix=BOTH | {"prob": 1.0}), Digits(4, mix=BOTH | {"prob": 1.0})):
        data.trainer = trainer
        data.setup("fit")
        assert next(iter(data.train_dataloader()))[1].shape[1] == 12
    assert [outputs(data, classes) for classes in (3, 20)] == [12, 20]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "autoaugment", "augmix"])
def test_policies_keep_shape_and_type(channels: int, policy: str) -> None:
    augment = Augmentation({"auto_augment": policy, "scale": [0.3, 1.0], "hflip": 0.5}, (9, 11))
    assert augment.crops
    for seed in range(5):
        torch.manual_seed(seed)
        image = torch.randint(0, 256, (channels, 20, 30), dtype=torch.uint8)
        out = augment(image, lambda x: x.float() / 255)
        assert out.shape == (channels, 9, 11)
        assert out.dtype == torch.float32


def test_evaluation_is_not_augmented(root: Path) -> None:
    plain, augmented = folder(root), folder(root, augment=STRONG)
    assert same(list(plain.val_dataloader()), list(augmented.val_dataloader()))
    assert augmented.image_set("test").augment is None


def test_the_digits_take_both() -> None:
    data = Digits(8, augment={"padding": 1}, mix=BOTH, seed=1)
    data.setup("fit")
    loader = data.train_dataloader()
    first = [x.clone() for x, _ in islice(loader, 3)]
    again = [x for x, _ in islice(loader, 3)]
    assert all(map(torch.equal, first, again))
    assert first[0].shape == (8, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "setting", "value"),
    [
        ({"hflip": 1.5}, "augment.hflip", 1.5),
        ({"padding": -1}, "augment.padding", -1),
        ({"scale": [0.5]}, "augment.scale", [0.5]),
        ({"scale": [0.5, 2]}, "augment.scale", [0.5, 2]),
        ({"scale": [0.5, 1], "padding": 4}, "augment.padding", 4),
        ({"auto_augment": "rand"}, "augment.auto_augment", "rand"),
        ({"magnitude": 31}, "augment.magnitude", 31),
        ({"flip": 0.5}, "augment.flip", 0.5),
    ],
)
def test_augmentation_that_cannot_work_is_refused(settings: dict[str, Any], setting: str, value: Any) -> None:
    with refuses(setting, value):
        Augmentation(settings, (8, 8))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [({}, "mix.mixup_alpha"), ({"mixup_alpha": -1}, "mix.mixup_alpha"), ({"mixup_alpha": 1, "prob": 2}, "mix.prob")],
)
def test_mixing_that_cannot_work_is_refused(settings: dict[str, Any], setting: str) -> None:
    with refuses(setting):
        Mix(settings, 3)


def test_an_odd_batch_cannot_be_mixed(root: Path) -> None:
    with refuses("data.batch_size", 3, "mix pairs the samples that a device holds; use an even number"):
        folder(root, mix=BOTH, batch_size=3)


def test_a_random_crop_keeps_the_cached_image_whole(root: Path, on: Any) -> None:
    settings: dict[str, Any] = {"augment": {"scale": [0.1, 1.0]}, "size": 8}
    plain: list[Tensor] = on(folder(root, **settings), 1, 0)
    assert same(plain, on(folder(root, **settings, cache=0.001), 1, 0))
    image_folder._known.clear()
