"""``data=imagenet model=resnet50``, on a few small images in folders."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torchvision.models.resnet import Bottleneck

from syncbn.training import ImageNet
from syncbn.training.data.batches import SampleError
from syncbn.training.norm import replace
from tests.support.refuses import refuses
from tests.training.support.train_command import REPO, train

SMALL: dict[str, Any] = {"batch_size": 2, "num_classes": 3, "size": 32, "resize": 40}
SETTINGS = ["data=imagenet", "model=resnet50", "scheduler=steps", "logger=csv", "data.num_classes=3"]
SETTINGS += ["data.size=32", "data.resize=40", "data.batch_size=2", "data.num_workers=1", "trainer.max_epochs=1"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """9 images to train on, 5 to validate, of unequal sizes and noise, each class brighter than the one before."""
    noise = np.random.default_rng(0)
    for part, counts in {"train": (3, 3, 3), "val": (1, 2, 2)}.items():
        for label, count in enumerate(counts):
            folder = tmp_path / "images" / part / f"n{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(64 * label, 64 * label + 64, (48 + 8 * number, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_it_trains_on_two_ranks_and_is_tested_on_each_image_once(root: Path, tmp_path: Path) -> None:
    run = train(tmp_path, *SETTINGS, f"data.root={root}", "~callbacks.checkpoint", "precise_batches=1")
    assert run.code == 0, run.err
    assert run.left == []
    result = run.json("result")
    assert result["steps"] == 2
    assert result["test"]["test/count"] == result["precise"]["precise/count"] == 5
    assert run.json("run")["normalization_batch"] == 4


def test_training_crops_are_drawn_and_evaluation_takes_the_middle(root: Path) -> None:
    data = ImageNet(str(root), **SMALL, shuffle=False)
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert first.shape == (8, 3, 32, 32)
    assert not torch.equal(first, second)
    loader.sampler.set_epoch(0)
    assert torch.equal(torch.cat([x for x, _ in loader]), first)
    validated, labels = (torch.cat(each) for each in zip(*data.val_dataloader(), strict=True))
    assert labels.tolist() == [0, 1, 1, 2, 2]
    again = torch.cat([x for x, _ in data.test_dataloader()])
    assert torch.equal(validated, again)


def test_the_folders_are_looked_through_once(root: Path) -> None:
    data = ImageNet(str(root), **SMALL)
    data.setup("fit")
    images = data.train, data.val
    data.setup("test")
    assert (data.train, data.val) == images


def test_the_middle_of_a_plain_image_is_its_colour_normalized(root: Path) -> None:
    """Computed by hand from the statistics that torchvision's own models are documented with."""
    pixels = np.zeros((80, 100, 3), dtype=np.uint8)
    pixels[20:60, 30:70] = (255, 51, 0)  # scaled by a half, what is left of the middle 16 pixels is this and no edge
    for path in root.glob("val/n0/*.png"):
        Image.fromarray(pixels).save(path)
    data = ImageNet(str(root), **SMALL | {"size": 16})
    data.setup("test")
    image, label = data.val[0]
    assert label == 0
    expected = torch.tensor([(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0 - 0.406) / 0.225])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 16, 16), rtol=1e-5, atol=1e-5)


def test_what_is_no_imagenet_is_refused_by_name(root: Path) -> None:
    with refuses("data.num_classes", 1000, f"{root}/train has 3 folders", "; use data.num_classes=3"):
        ImageNet(str(root)).setup("fit")
    (root / "val/n2").rename(root / "val/other")
    with refuses("data.root", str(root), "train and val must have folders of the same names; n2 is in"):
        ImageNet(str(root), **SMALL).setup("fit")
    for path in root.glob("train/n1/*"):
        path.unlink()
    with refuses("data.root", str(root), "Found no valid file for the classes n1"):
        ImageNet(str(root), **SMALL).setup("fit")


def test_an_image_that_cannot_be_read_is_named(root: Path) -> None:
    broken = root / "train/n1/0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    data = ImageNet(str(root), **SMALL)
    data.setup("fit")
    with pytest.raises(
        SampleError, match=rf"^sample 3 of ImageFolder \({re.escape(str(broken))}\): OSError: .* remove it$"
    ):
        list(data.train_dataloader())


def test_the_network_is_resnet_50_whose_blocks_begin_as_identities() -> None:
    model = instantiate(OmegaConf.load(REPO / "conf/model/resnet50.yaml"))
    assert sum(weight.numel() for weight in model.parameters()) == 25_557_032
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 53
    blocks = [layer for layer in model.modules() if isinstance(layer, Bottleneck)]
    assert len(blocks) == 16
    assert not any(block.bn3.weight.any() for block in blocks)
    replace.prepare_model(
        model, {"name": "group_norm", "num_groups": 32, "min_channels": 1}
    )  # as the study asks for it
    layers = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert [layer.num_groups for layer in layers] == [32] * 53
    assert not any(block.bn3.weight.any() for block in blocks)
