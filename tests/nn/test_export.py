"""In evaluation a converted model exports as plain batch norm; after ``revert`` all of torch's other tools take it."""

import io
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import syncbn
from tests.nn.support.own_forward import NormAct
from tests.support.ranks import Ranks

pytestmark = [
    # What torch's own tools say of each other.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
]


class Net(nn.Module):
    """Batch norm after a convolution, before one, and over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.before = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 1)
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.body(self.before(x))).mean((2, 3)))


def an_input(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Module:
    """A network in evaluation whose batch norms have seen something."""
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(2 * an_input() + 1)
    return net.eval()


@pytest.fixture
def converted(net: nn.Module) -> nn.Module:
    return syncbn.convert(deepcopy(net))


@pytest.fixture
def reverted(converted: nn.Module) -> nn.Module:
    return syncbn.revert(deepcopy(converted))


def export(net: nn.Module) -> ExportedProgram:
    return torch.export.export(net, (an_input(),), dynamic_shapes=({0: Dim("batch")},))


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_the_exported_graph_is_that_of_plain_batch_norm(net: nn.Module, converted: nn.Module) -> None:
    plain, ours = export(net), export(converted)
    assert str(ours.graph) == str(plain.graph)
    assert operators(ours).count("aten.batch_norm.default") == 3
    assert str(ours.run_decompositions().graph) == str(plain.run_decompositions().graph)
    for size in (2, 5):
        assert torch.equal(ours.module()(an_input(size)), net(an_input(size)))


def test_a_subclass_exports_as_what_it_was() -> None:
    layer = NormAct(3).eval()
    expected = str(export(layer).graph)
    assert str(export(syncbn.convert(layer)).graph) == expected


def test_torchs_synchronized_layer_exports_as_plain_batch_norm() -> None:
    expected = str(export(nn.BatchNorm2d(3).eval()).graph)
    assert str(export(syncbn.convert(nn.SyncBatchNorm(3)).eval()).graph) == expected


def of_the_rank(rank: int, world_size: int, converted: nn.Module) -> list[str]:
    return operators(export(converted))


def test_a_process_group_changes_nothing_in_it(ranks: Ranks, net: nn.Module, converted: nn.Module) -> None:
    assert ranks.run(of_the_rank, converted, world_size=2, timeout=100) == [operators(export(net))] * 2


def test_a_saved_program_loads_and_runs_where_syncbn_is_not_installed(converted: nn.Module, tmp_path: Path) -> None:
    torch.export.save(export(converted), tmp_path / "net.pt2")
    torch.save((an_input(5), converted(an_input(5))), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["syncbn"] = None  # an import of it raises
x, expected = torch.load("expected.pt")
assert torch.equal(torch.export.load("net.pt2").module()(x), expected)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_fx_traces_what_is_reverted(net: nn.Module, reverted: nn.Module) -> None:
    graph = torch.fx.symbolic_trace(reverted)
    assert graph.code == torch.fx.symbolic_trace(net).code
    assert torch.equal(graph(an_input()), net(an_input()))


def test_conv_bn_fusion_takes_what_is_reverted(net: nn.Module, reverted: nn.Module) -> None:
    from torch.ao.quantization import fuse_modules
    from torch.fx.experimental.optimization import fuse

    for fused in (fuse(reverted), fuse_modules(reverted, ["stem.0", "stem.1", "stem.2"])):
        assert not any(type(module) is nn.BatchNorm2d for module in fused.stem.modules())
        torch.testing.assert_close(fused(an_input()), net(an_input()))


def test_torchs_own_fusion_takes_what_is_converted_too(net: nn.Module, converted: nn.Module) -> None:
    fused = nn.utils.fusion.fuse_conv_bn_eval(*converted.stem[:2])
    torch.testing.assert_close(fused(an_input()), net.stem[:2](an_input()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the check of the input's shape
def test_torchscript_traces_what_is_converted_and_scripts_what_is_reverted(
    net: nn.Module, converted: nn.Module, reverted: nn.Module
) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(converted, an_input()), file)
    file.seek(0)
    for module in (torch.jit.load(file), torch.jit.script(reverted)):
        torch.testing.assert_close(module(an_input(5)), net(an_input(5)))
