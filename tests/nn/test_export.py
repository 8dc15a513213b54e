"""The way out of training: export, fusion and tracing take a model as they take torch's."""

import pytest
import torch
from torch import Tensor, fx, nn

import syncbn
from tests.nn.oracle import CHANNELS
from tests.nn.oracle import with_parameters as parameters


def a_net() -> nn.Module:
    torch.manual_seed(0)
    net = parameters(nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    net(images())  # running statistics of some batch
    return net.eval()


def images() -> Tensor:
    return torch.randn(4, CHANNELS, 3, 2, generator=torch.Generator().manual_seed(1))


# Torch's own doing, in export.
@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_evaluation_exports_to_torchs_operations_alone() -> None:
    net = a_net()
    expected = net(images())
    program = torch.export.export(syncbn.convert(net), (images(),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default"]
    assert torch.equal(program.module()(images()), expected)


def test_a_synchronized_layer_in_evaluation_fuses_into_a_convolution() -> None:
    net = syncbn.convert(a_net())
    fused = nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(fused(images()).relu(), net(images()))


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
def test_after_revert_fx_traces_and_fuses() -> None:
    from torch.fx.experimental.optimization import fuse  # whose import warns

    net = a_net()
    expected = net(images())
    reverted = syncbn.revert(syncbn.convert(net))
    traced = fx.symbolic_trace(reverted)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    fused = fuse(reverted)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    torch.testing.assert_close(fused(images()), expected)
