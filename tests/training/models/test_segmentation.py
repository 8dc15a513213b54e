"""Tests the segmentation network, its LightningModule, and the pictures of its test."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from syncbn.training.data.segmentation.digit_scenes import DigitScenes
from syncbn.training.models.segmentation.deeplab import DeepLab
from syncbn.training.models.segmentation.segmentation import Segmentation
from syncbn.training.plots import masks
from syncbn.training.plots.segmentation_examples import SegmentationExamples
from tests.support.refuses import refuses

SGD = partial(torch.optim.SGD, lr=0.1)


def module(network: nn.Module | None = None, **options: Any) -> Segmentation:
    made = Segmentation(network or nn.Identity(), SGD, **{"num_classes": 3, **options})
    made.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
    return made


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (6, 10)])
def test_each_pixel_has_a_score_for_each_class(size: tuple[int, int]) -> None:
    assert DeepLab(3, 7, width=4, dilations=[1, 2, 4])(torch.randn(2, 3, *size)).shape == (2, 7, *size)


def test_only_the_pooling_branch_refuses_a_single_image() -> None:
    network = DeepLab(width=4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        network(torch.randn(1, 1, 32, 32))
    network.pooling.eval()
    assert network(torch.randn(1, 1, 32, 32)).isfinite().all()


def test_the_pooling_branch_sees_the_whole_image() -> None:
    """A pixel changes the scores of the farthest one, which the convolutions do not reach."""
    network = DeepLab(width=4).eval().double()
    image = torch.randn(1, 1, 96, 96, dtype=torch.float64)
    other = image.clone()
    other[..., 0, 0] += 1
    assert (network(image) != network(other))[..., -1, -1].any()
    network.pooling[1].weight.data.zero_()
    assert (network(image) == network(other))[..., -1, -1].all()


@pytest.mark.parametrize("weights", [None, [0.1, 1.0, 2.0]])
def test_the_mean_loss_of_devices_is_that_of_the_whole_batch(weights: list[float] | None) -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.randint(3, (6, 4, 4))
    target[:3] = 0  # the devices' shares have other classes, so other weights
    made = module(class_weights=weights)
    whole = made._loss(scores, target)
    halves = [made._loss(scores[part], target[part]) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-14, atol=0)
    by_hand = -scores.log_softmax(1).gather(1, target[:, None])[:, 0]
    if weights is not None:
        by_hand = by_hand * torch.tensor(weights, dtype=torch.float64)[target]
    torch.testing.assert_close(whole, by_hand.mean(), rtol=1e-7, atol=0)  # the weights are in float32


def test_miou_is_of_all_pixels_of_all_images_and_leaves_out_what_is_ignored() -> None:
    torch.manual_seed(1)
    batches = [(torch.randn(size, 3, 5, 5), torch.randint(3, (size, 5, 5))) for size in (4, 1)]
    for _, target in batches:
        target[:, 0] = 255
    made = module().eval()
    for batch in batches:
        made.validation_step(batch, 0)
    made.validation_step(
        (torch.randn(0, 3, 5, 5), torch.zeros(0, 5, 5, dtype=torch.long)), 0
    )  # a device without images
    predicted = np.concatenate([scores.argmax(1)[:, 1:].numpy().ravel() for scores, _ in batches])
    true = np.concatenate([target[:, 1:].numpy().ravel() for _, target in batches])
    ious = [((predicted == c) & (true == c)).sum() / ((predicted == c) | (true == c)).sum() for c in range(3)]
    assert made.val_miou.compute() == pytest.approx(np.mean(ious))
    assert made.val_loss.compute().isfinite()


def test_as_many_weights_as_classes() -> None:
    with refuses("module.class_weights", [1.0], "there are 3 classes"):
        module(class_weights=[1.0])


def test_scenes_have_unseen_digits_in_the_test_and_are_the_same_for_all_seeds() -> None:
    parts: dict[int, list[Tensor]] = {}
    for seed in (0, 1):
        data = DigitScenes(images=32, eval_images=16, seed=seed)
        data.setup("fit")
        parts[seed] = [*data.train.tensors, *data.val.tensors, *data.test.tensors]
    assert all(torch.equal(one, other) for one, other in zip(parts[0], parts[1], strict=True))
    images, target = parts[0][:2]
    assert images.shape == (32, 1, 32, 32)
    assert target.shape == (32, 32, 32)
    assert set(target.unique().tolist()) <= set(range(11))
    found = [len(set(mask.unique().tolist()) - {0}) for mask in target]
    assert min(found) >= 1
    assert max(found) == 3
    # Ink is brighter than the paper of its image; noise and clutter are background.
    brighter = [float(i[0][m > 0].mean() - i[0][m == 0].mean()) for i, m in zip(images, target, strict=True)]
    assert min(brighter) > 0.1
    assert not torch.equal(parts[0][2][:16], images[:16])


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [("images", 0, "1 or more"), ("eval_images", 1.5, "whole number"), ("num_classes", 10, "the scenes have 11")],
)
def test_settings_of_the_scenes(setting: str, value: Any, hint: str) -> None:
    with refuses(f"data.{setting}", value, hint):
        DigitScenes(**{setting: value})


class Fixed(nn.Module):
    """Predicts class 2 where the first channel of an image is above 0, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        above = (images[:, :1] > 0).float()
        return torch.cat([1 - above, torch.zeros_like(above), above], 1)


@pytest.mark.filterwarnings("ignore")  # of Lightning, on loaders without workers
def test_the_first_test_images_are_saved_with_their_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, target = torch.randn(5, 1, 8, 8), torch.randint(3, (5, 8, 8))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, target), batch_size=2)
    callback = SegmentationExamples(count=3, directory=tmp_path / "run")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", default_root_dir=tmp_path, **quiet)
    made = Segmentation(Fixed(), SGD, num_classes=3)
    trainer.test(made, loader, verbose=False)
    pixels, rows = masks.read(tmp_path / "run" / "examples.npz")
    assert list(rows) == ["truth", "prediction"]
    assert np.array_equal(rows["truth"], target[:3])
    assert np.array_equal(rows["prediction"], 2 * (images[:3, 0] > 0))
    low, high = images[:3].amin((1, 2, 3)), images[:3].amax((1, 2, 3))
    by_hand = 255 * (images[:3, 0] - low[:, None, None]) / (high - low)[:, None, None]
    assert np.abs(pixels - by_hand.numpy()).max() <= 0.51
    assert (tmp_path / "run" / "examples.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "run" / "examples.npz").read_bytes()
    trainer.test(made, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(-images, target)), verbose=False)
    assert (tmp_path / "run" / "examples.npz").read_bytes() == before  # a repeated test, say on corrupted images


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_a_number_of_examples(count: Any) -> None:
    with refuses("callbacks.examples.count", count, "whole number"):
        SegmentationExamples(count)
