"""In evaluation a converted model is to ONNX what it was before, with any number of samples."""

from collections import Counter
from copy import deepcopy

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.extras.support import zoo

# What torch says of its own tree of arguments.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


def export(model: nn.Module, x: Tensor, **options: object) -> torch.onnx.ONNXProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.onnx.export(model.eval(), (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, **options)


def kinds(program: torch.onnx.ONNXProgram) -> Counter:
    return Counter(node.op_type for node in program.model_proto.graph.node)


def run(program: torch.onnx.ONNXProgram, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def assert_same(model: nn.Module, x: Tensor, **options: object) -> Counter:
    """Exports the model as it is and converted; returns how many nodes of each kind there are."""
    plain, ours = export(deepcopy(model), x, **options), export(syncbn.convert(model), x, **options)
    assert kinds(ours) == kinds(plain)
    for batch in (x, x.repeat(3, *[1] * (x.dim() - 1))):
        torch.testing.assert_close(run(ours, batch), model(batch), rtol=1e-4, atol=1e-5)
    return kinds(ours)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.image, self.text = nn.BatchNorm3d(3), nn.BatchNorm2d(3), nn.BatchNorm1d(3)
        for layer in self.children():
            zoo.trained(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.text(self.image(self.video(x).mean(2)).mean(2))


def test_a_layer_of_any_dimension_is_one_batch_normalization() -> None:
    assert assert_same(Norms(), torch.randn(2, 3, 2, 4, 4)) == {"BatchNormalization": 3, "ReduceMean": 2}


@pytest.mark.parametrize("entry", [zoo.TIMM["efficientnet"], zoo.TORCHVISION[0]], ids=str)
def test_a_models_batch_norms_go_into_its_convolutions(entry: zoo.Entry) -> None:
    counts = assert_same(zoo.build(entry), zoo.batch(entry, 2))
    assert counts["Conv"] > 10
    assert not counts["BatchNormalization"]
