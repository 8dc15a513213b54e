"""An image file becomes the input that it was in the test of the run, bitwise; also in what export compares on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from syncbn.inference import sample_inputs
from syncbn.inference.preprocessing import Preprocessing, class_names, preprocessing
from syncbn.inference.trained import Trained
from syncbn.training.data.image_archives import CIFAR
from syncbn.training.data.image_folder import ImageFolder
from tests.support.refuses import refuses
from tests.training.data.support.pictures import pictures
from tests.training.data.test_image_archives import cifar10

COUNTS = {"ant": 20, "bee hive": 20}


def of(checkpoint: dict[str, Any], data: dict[str, Any]) -> Preprocessing:
    found = preprocessing(checkpoint, data)
    assert found is not None
    return found


def opened(data: dict[str, Any], checkpoint: dict[str, Any]) -> Trained:
    """A run of these data."""
    known = preprocessing(checkpoint, data)
    return Trained(torch.nn.Identity(), {"data": data}, None, known, Path("best.ckpt"), None)


@pytest.mark.parametrize("size", [None, 8, [6, 10]], ids=str)
def test_a_folder_of_images(tmp_path: Path, size: Any) -> None:
    root = pictures(tmp_path / "images", COUNTS, size=(12, 16))
    data = ImageFolder(str(root), size=size, cache_dir=str(tmp_path), crop_pct=0.8)
    data.prepare_data()
    data.setup("test")
    data.settle_statistics()
    checkpoint = {"state_dict": {}, "ImageFolder": data.state_dict()}
    settings = {"_target_": "syncbn.training.ImageFolder", "root": str(root)}
    convert = of(checkpoint, settings)
    tested = data.image_set("test")
    assert len(tested) == 4
    for index, (path, _) in enumerate(tested.samples):
        expected = tested[index][0]
        assert torch.equal(convert(path), expected)
        assert torch.equal(convert(Path(path)), expected)
        with Image.open(path) as image:
            assert torch.equal(convert(image), expected)
    assert class_names(checkpoint, settings) == list(COUNTS)
    inputs = sample_inputs.images(opened(settings, checkpoint), 3, trust=False)
    assert torch.equal(inputs, torch.stack([tested[index][0] for index in range(3)]))


def test_an_archive(tmp_path: Path) -> None:
    data = CIFAR(str(cifar10(tmp_path)), val_fraction=0.2)
    data.setup("test")
    data.settle_statistics()
    checkpoint = {"CIFAR": data.state_dict()}
    settings = {"_target_": "syncbn.training.CIFAR", "root": str(tmp_path), "num_classes": None}
    convert = of(checkpoint, settings)
    tested = data.image_set("test")
    image = Image.fromarray(tested.read(0).permute(1, 2, 0).numpy())
    assert torch.equal(convert(image), tested[0][0])
    inputs = sample_inputs.images(opened(settings, checkpoint), 2, trust=False)
    assert torch.equal(inputs, torch.stack([tested[0][0], tested[1][0]]))
    drawn = sample_inputs.images(opened(settings | {"test_images": 2, "split_seed": 1}, checkpoint), 2, trust=False)
    assert torch.equal(drawn, torch.stack([tested[2][0], tested[3][0]]))
    del checkpoint["CIFAR"]["size"]  # as version 0.1 wrote it
    assert of(checkpoint, settings) == convert


def test_data_of_another_module_need_trust() -> None:
    with refuses("data._target_", "my.Images", "--trust"):
        sample_inputs.images(opened({"_target_": "my.Images"}, {}), 2, trust=False)
    with refuses("data.root", "${oc.env:HOME}", "no value"):
        data = {"_target_": "syncbn.training.CIFAR", "root": "${oc.env:HOME}"}
        sample_inputs.images(opened(data, {}), 2, trust=False)


@pytest.mark.parametrize(
    "state",
    [
        {"mean": [0.5, 0.5], "std": [0.5, 0.5], "size": [8, 8]},
        {"mean": [0.5], "std": [0.5]},
        {"mean": [0.5], "std": [0.5], "size": [8, -8]},
        {"mean": [0.5], "std": [0.5], "size": [10**9, 8]},
        {"mean": ["a"], "std": [0.5], "size": [8, 8]},
        {"mean": None, "std": None, "size": [8, 8], "classes": "ab"},
    ],
    ids=str,
)
def test_a_state_of_something_else_is_no_preprocessing(state: dict[str, Any]) -> None:
    assert preprocessing({"Images": state}, {"_target_": "my.Images"}) is None
    assert class_names({"Images": state}, {}) is None


@pytest.mark.parametrize("part", ["state_dict", "hyper_parameters", "datamodule_hyper_parameters"])
def test_a_buffer_or_an_argument_of_these_names_hides_nothing(part: str) -> None:
    other = {"mean": torch.zeros(3), "std": torch.ones(3), "classes": 2}
    saved = {"mean": [0.5], "std": [0.25], "size": [8, 8], "classes": ["ant", "bee"]}
    checkpoint = {part: other, "Images": saved}
    assert class_names(checkpoint, {}) == ["ant", "bee"]
    assert of(checkpoint, {"_target_": "my.Images"}) == Preprocessing(1, (8, 8), (0.5,), (0.25,))
