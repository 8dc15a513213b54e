"""torchvision beside torch for the CPU, and what it does to models besides building them."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

import syncbn
from syncbn.nn.modules import Synchronized
from tests.extras.support import zoo
from tests.extras.test_lossless import there_and_back

RESNET = zoo.TORCHVISION[0]


def test_it_imports_and_so_do_the_packages_that_import_it() -> None:
    modules = "lightning, torchmetrics, torchvision.datasets, torchvision.transforms.v2"
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, timeout=120)


def test_a_traced_model_there_and_back() -> None:
    model, x = zoo.build(RESNET), zoo.batch(RESNET, 2)
    expected = create_feature_extractor(model, ["avgpool"]).eval()(x)["avgpool"]
    traced = create_feature_extractor(deepcopy(model), ["avgpool"]).eval()
    there_and_back(traced, check=lambda: torch.equal(traced(x)["avgpool"], expected))
    traced = create_feature_extractor(syncbn.revert(syncbn.convert(model)), ["avgpool"]).eval()
    assert torch.equal(traced(x)["avgpool"], expected)
    assert not any(isinstance(layer, Synchronized) for layer in traced.modules())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_a_quantizable_model_fuses_after_revert(name: str) -> None:
    model, x = get_model(f"quantized_{name}", weights=None, quantize=False).eval(), zoo.batch(RESNET, 2)
    expected = model(x)
    there_and_back(model, check=lambda: torch.equal(model(x), expected))
    model.fuse_model()
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    torch.testing.assert_close(model(x), expected)
