"""What ImageNet's data module says before it has read an image; what it reads, tests/extras looks at."""

import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from syncbn.training import ImageNet
from syncbn.training.errors import SettingError
from syncbn.training.launch import rank
from tests.support.refuses import refuses


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Empty folders, where torchvision is not."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    return str(tmp_path)


def test_without_torchvision_one_line_says_how_to_have_it(root: str) -> None:
    with refuses("data", "imagenet", "torchvision ", " is not installed; pip install timm torchvision torch=="):
        ImageNet(root)


def test_a_part_that_is_missing_is_named_before_that(root: str) -> None:
    Path(root, "val").rmdir()
    with refuses("data.root", root, f"there is no directory {root}/val; ImageNet is "):
        ImageNet(root)


@pytest.mark.parametrize(("size", "resize"), [(0, 8), (9, 8)])
def test_sizes_that_cannot_be_cut_out_are_refused(root: str, size: int, resize: int) -> None:
    with refuses("data.size", size, "use 1 or more, and at most data.resize=8"):
        ImageNet(root, size=size, resize=resize)


def test_another_word_for_what_is_left_over_is_refused(root: str) -> None:
    with refuses("data.remainder", "keep", "use one of drop, pad, uneven"):
        ImageNet(root, remainder="keep")


def test_a_target_whose_package_is_missing_is_one_line(root: str) -> None:
    missing = OmegaConf.create({"network": {"_target_": "torchvision.models.resnet50"}})
    with pytest.raises(SettingError, match=r"^_target_=torchvision.models.resnet50: there is no package torchvision "):
        rank.build(missing)
    with pytest.raises(InstantiationException):  # a name that a package does not have is another matter
        rank.build(OmegaConf.create({"_target_": "torch.nn.NoSuchLayer"}))
