"""``syncbn export`` to ONNX, and ``syncbn.load``, for networks of timm and torchvision: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import syncbn
from syncbn.inference import formats
from syncbn.inference.export import export
from syncbn.inference.preprocessing import preprocessing
from syncbn.training import ImageNet
from syncbn.training.models.libraries import timm_network, torchvision_network
from syncbn.training.models.networks import ResNet
from syncbn.training.norm.replace import remove_batch_norm
from tests.extras.support import zoo
from tests.extras.test_imagenet import SMALL, root  # noqa: F401  # a fixture
from tests.inference.support.crafted_runs import HERE, Decides, Several, crafted, seen_something
from tests.support.refuses import refuses

# What torch says of its own tree of arguments.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
ABOUT = {"num_classes": 10, "in_channels": 1, "pretrained": True}
NETWORKS = {"timm_network": (timm_network, "test_resnet"), "torchvision_network": (torchvision_network, "resnet18")}


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("kind", "norm"), [("timm_network", "sync"), ("torchvision_network", "none")])
def test_a_network_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, norm: str) -> None:
    """Its run began with pretrained weights; the checkpoint has all weights."""
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", pytest.fail)
    monkeypatch.setattr("timm.models._builder.load_pretrained", pytest.fail)
    build, name = NETWORKS[kind]
    net = build(name, 10, 1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            zoo.trained(layer)
    if norm == "none":
        remove_batch_norm(net)
    model = {"_target_": f"syncbn.training.{kind}", "name": name} | ABOUT
    run = crafted(tmp_path / "a", net, model, norm={"name": norm})
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        expected = net.eval()(x)
        assert torch.equal(syncbn.load(run)(x), expected)
    exported = export(run, shape="1,32,32")
    assert exported.path == run / "network.onnx"
    found = session(exported.path).run(["output"], {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_file_names_its_classes_and_takes_any_number_of_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = {"_target_": "syncbn.training.ResNet", "in_channels": 1, "num_classes": 10, "width": 4}
    net = seen_something(ResNet(width=4), 1, 8, 8)
    run = crafted(tmp_path / "a", net, model, trainer={"precision": "bf16-true"})
    capfd.readouterr()
    exported = export(run)
    assert capfd.readouterr() == ("", "")
    assert exported.inputs == "8 test images"
    about = {each.key: json.loads(each.value) for each in onnx.load(exported.path).metadata_props}
    assert about["classes"] == list("0123456789")
    assert about["norm"] == "sync"
    assert about["preprocessing"]["size"] == [8, 8]
    runs = session(exported.path)
    assert [each.shape for each in runs.get_inputs()] == [["batch", 1, 8, 8]]
    for count in (1, 2, 7):
        assert runs.run(None, {"input": np.zeros((count, 1, 8, 8), np.float32)})[0].shape == (count, 10)


def test_several_outputs(tmp_path: Path) -> None:
    run = crafted(tmp_path / "a", seen_something(Several(), 1, 8, 8), {"_target_": f"{HERE}.Several"})
    exported = export(run, trust=True)
    assert [each.name for each in session(exported.path).get_outputs()] == ["output_0", "output_1"]


class Odd(nn.Module):
    """Uses an operation that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_what_cannot_be_exported_is_one_line_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decides = crafted(tmp_path / "a", Decides(), {"_target_": f"{HERE}.Decides"})
    with refuses("export", None, "crafted_runs.py:", "if y.sum() > 0:"):
        export(decides, trust=True)
    program = formats.traced(Odd(), torch.ones(2, 3))
    with refuses("--to", "onnx", "cannot be converted", "bessel_j0", "--to torch"):
        formats.FORMATS["onnx"].write(program, tmp_path / "x.onnx", {})
    assert not list(tmp_path.rglob("*.onnx"))


def test_an_image_of_imagenet_becomes_what_torchvision_makes_of_it(root: Path, tmp_path: Path) -> None:  # noqa: F811
    data = ImageNet(str(root), **SMALL)
    data.setup("test")
    settings: dict[str, Any] = {"_target_": "syncbn.training.ImageNet", "root": str(root), **SMALL}
    convert = preprocessing({"ImageNet": data.state_dict()}, settings)
    assert convert is not None
    for index, (path, _) in enumerate(data.val.samples):
        torch.testing.assert_close(convert(path), data.val[index][0], rtol=0, atol=1e-6)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (57, 83, 3), dtype=np.uint8))
    for shape in ((57, 83), (83, 57), (40, 133)):
        image = wide.resize(shape)
        theirs = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])(image)
        mean, std = (torch.tensor(each)[:, None, None] for each in (convert.mean, convert.std))
        torch.testing.assert_close(convert(image), (theirs / 255 - mean) / std, rtol=0, atol=1e-6)
    assert data.state_dict()["classes"] == ["n0", "n1", "n2"]
