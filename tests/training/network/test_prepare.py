"""Memory format and compilation of a network."""

import sysconfig
from functools import partial
from unittest import mock

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.models.classifier import Classifier
from syncbn.training.models.networks import MLP, ResNet
from syncbn.training.network import check, checkpoint_activations, freeze, prepare
from syncbn.training.norm.plugin import SyncBatchNormPlugin
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.settled_config import settled

pytestmark = [  # of torch's compiler, 2.13
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def module(network: nn.Module) -> Classifier:
    return Classifier(network, lambda groups: torch.optim.SGD(groups, lr=0.1), num_classes=10)


def test_weights_and_images_are_channels_last() -> None:
    net = module(ResNet(in_channels=3))
    expected = net.eval()(images := torch.randn(2, 3, 8, 8))
    prepare.use_channels_last(net)
    seen: list[Tensor] = []
    net.network.stages[1].register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))
    torch.testing.assert_close(net(images), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()
    for conv in (net.network.stages[1].conv1, net.network.stages[1].shortcut[0]):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        net(images).sum().backward()
        assert conv.weight.grad.stride() == conv.weight.stride()  # otherwise DistributedDataParallel warns


def test_a_module_without_a_network_has_all_its_parts_prepared() -> None:
    pair = nn.Module()
    pair.one, pair.two, pair.act = ResNet(), MLP(), nn.ReLU()
    assert prepare.networks(pair) == {"one": pair.one, "two": pair.two}
    assert list(prepare.networks(module(MLP()))) == ["network"]


def test_names_stay_the_same_when_compiled() -> None:
    net = module(ResNet())
    names = list(net.state_dict())
    prepare.compile_networks(net, "default")
    assert list(net.state_dict()) == names


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = settled("compile=true", "trainer.accelerator=cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refuses("compile", True, "no C++ compiler (no-such-compiler)", "compile=false"):
        check.check(plan)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    with refuses("compile", True, "Python.h" if check.shutil.which("g++") else "C++"):
        check.check(plan)


def test_settings_without_effect_and_out_of_range_are_refused() -> None:
    with refuses("compile_mode", "default", "compile=true too"):
        check.check(settled("compile_mode=default"))
    with refuses("compile_mode", "fast", "max-autotune"):
        settled("compile=true", "compile_mode=fast")
    with refuses("freeze", hint := 5, '["network.stem*"]'):
        settled(f"freeze={hint}")


def trained(rank: int, world_size: int, compiled: bool, norm: str, globs: list[str]) -> dict[str, Tensor]:
    """As a run does it: compiled first, then converted when fitting begins, then DistributedDataParallel."""
    torch._dynamo.utils.counters.clear()  # the process has run other tests
    torch.manual_seed(0)
    net = module(ResNet(width=4, blocks=[1, 1]))
    freeze.freeze(net, ["network.stem*"])
    if globs:
        checkpoint_activations.checkpoint(net, globs)
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        if compiled:
            prepare.compile_networks(net)
    if norm == "sync":
        SyncBatchNormPlugin().apply(net)
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in torch.randn(3, 8, 1, 8, 8, generator=torch.Generator().manual_seed(1)):
        ddp(batch.chunk(world_size)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    torch._dynamo.reset()
    return net.state_dict()


@pytest.mark.parametrize(("norm", "globs"), [("sync", []), ("sync", ["*stages.1"]), ("local", ["*stages.1"])])
def test_a_compiled_network_trains_as_without(ranks: Ranks, norm: str, globs: list[str]) -> None:
    """The graphs are those of a run; they run with torch's operators, since a C++ compiler takes a minute."""
    plain, compiled = (ranks.run(trained, each, norm, globs, world_size=2)[0] for each in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    assert compiled["network.stages.1.bn1.num_batches_tracked"] == 3
