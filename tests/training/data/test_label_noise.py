"""Wrong labels and outliers: how many, which, and that all else is as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from syncbn.training.data.corruptions import corrupt
from syncbn.training.data.digits import Digits
from syncbn.training.data.label_noise import relabelled, with_outliers
from tests.support.refuses import refuses

SHARES = st.floats(0, 1) | st.sampled_from([0.05, 0.2, 0.4])


@given(n=st.integers(0, 90), share=SHARES, classes=st.integers(2, 12), seed=st.integers(0, 2**32 - 1))
def test_exactly_so_many_labels_are_another_class(n: int, share: float, classes: int, seed: int) -> None:
    labels = torch.arange(n) % classes
    state = torch.get_rng_state()
    made = relabelled(labels, share, classes, seed=seed)
    assert (made != labels).sum() == round(share * n)
    assert torch.equal(labels, torch.arange(n) % classes)
    assert ((made >= 0) & (made < classes)).all()
    assert torch.equal(made, relabelled(labels, share, classes, seed=seed))
    assert torch.equal(state, torch.get_rng_state())


def test_every_other_class_is_as_likely() -> None:
    made = relabelled(torch.full((90_000,), 3), 1.0, 10, seed=0)
    counts = torch.bincount(made, minlength=10)
    assert counts[3] == 0
    assert counts[counts > 0].numel() == 9
    assert (counts[counts > 0] - 10_000).abs().max() < 400  # of a standard deviation of 94


@given(n=st.integers(0, 90), share=SHARES, seed=st.integers(0, 2**32 - 1))
def test_exactly_so_many_images_are_scaled(n: int, share: float, seed: int) -> None:
    images = torch.ones(n, 1, 2, 2)
    made = with_outliers(images, share, 10.0, seed=seed)
    scaled = (made == 10).flatten(1).all(1)
    assert scaled.sum() == round(share * n)
    assert torch.equal(made[~scaled], images[~scaled])
    assert (images == 1).all()
    assert torch.equal(made, with_outliers(images, share, 10.0, seed=seed))


def digits(**options: object) -> Digits:
    data = Digits(**options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def parts(data: Digits) -> list[Tensor]:
    return [each for part in (data.train, data.val, data.test) for each in part.tensors]


def test_digits_are_what_they_were_unless_asked() -> None:
    """Every image as scikit-learn has it, with its label."""
    pixels, labels = load_digits(return_X_y=True)
    names = {tuple(image): label for image, label in zip((pixels / 16).tolist(), labels.tolist(), strict=True)}
    plain, off = digits(), digits(label_noise=0, outliers=0, outlier_scale=3.0, corrupt_train=False)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts(plain), parts(off), strict=True))
    for x, y in zip(*[iter(parts(plain))] * 2, strict=True):
        assert [names[tuple(image)] for image in x.flatten(1).double().tolist()] == y.tolist()


def test_a_share_of_the_training_images_is_wrong_and_no_other() -> None:
    plain, wrong = digits(), digits(label_noise=0.4, outliers=0.1, seed=5)
    (x, y, *others), (x2, y2, *others2) = parts(plain), parts(wrong)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, others2, strict=True))
    scaled, relabelled_ = (x != x2).flatten(1).any(1), y != y2
    assert (scaled.sum(), relabelled_.sum()) == (117, 467)  # of 1,167
    assert torch.equal(x2[scaled], 10 * x[scaled])
    assert 20 < (scaled & relabelled_).sum() < 75  # drawn apart: 47 are to be expected
    again, other = digits(label_noise=0.4, outliers=0.1, seed=5), digits(label_noise=0.4, outliers=0.1, seed=6)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts(wrong), parts(again), strict=True))
    assert not torch.equal(wrong.train.tensors[1], other.train.tensors[1])
    assert not torch.equal(wrong.train.tensors[0], other.train.tensors[0])


@pytest.mark.parametrize("everything", [False, True])
def test_the_test_or_everything_is_corrupted(everything: bool) -> None:
    plain = digits()
    seen = digits(corruption="gaussian_noise", severity=2, corrupt_train=everything or None)
    pixels, _ = load_digits(return_X_y=True)
    whole = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    noisy = dict(zip(map(tuple, whole.flatten(1).tolist()), corrupt(whole, "gaussian_noise", 2), strict=True))
    for name in ("train", "val", "test"):
        (x, y), (x2, y2) = getattr(plain, name).tensors, getattr(seen, name).tensors
        assert torch.equal(y, y2)
        if name == "test" or everything:
            x = torch.stack([noisy[tuple(image)] for image in x.flatten(1).tolist()])
        assert torch.equal(x2, x)


def test_shards_are_made_of_what_comes_out() -> None:
    data = digits(shards="labels", num_shards=2, label_noise=0.2, outliers=0.1)
    assert data.parts is not None
    labels = data.train.tensors[1]
    assert torch.equal(labels, digits(label_noise=0.2).train.tensors[1])
    assert all((labels[part] // 5 == shard).all() for shard, part in enumerate(data.parts))
    bright = digits(shards="brightness", num_shards=2, outliers=1.0).train.tensors[0]
    torch.testing.assert_close(bright[1], 10 * digits().train.tensors[0][1] + 0.8)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("corruption", "fog", "use one of gaussian_noise, "),
        ("severity", 2, "use data.corruption=gaussian_noise or another"),
        ("corrupt_train", True, "use data.corruption="),
        ("label_noise", 40, "use a share, a number from 0 to 1"),
        ("outliers", -0.1, "use a share"),
        ("outlier_scale", "big", "use a number"),
        ("label_noise", True, "use a share"),
    ],
)
def test_what_cannot_work_is_refused(name: str, value: object, words: str) -> None:
    with refuses(f"data.{name}", value, words):
        digits(**{name: value})


def test_another_severity_is_refused() -> None:
    with refuses("data.severity", 7, "use a whole number from 1 to 5"):
        digits(corruption="contrast", severity=7)
