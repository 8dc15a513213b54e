"""Memory format and compilation of a network."""

import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from syncbn.training.models.classifier import Classifier
from syncbn.training.models.networks import MLP, ResNet
from syncbn.training.network import check, prepare
from tests.support.refuses import refuses
from tests.training.support.settled_config import settled
from tests.training.support.train_command import train

needs_compiler = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="no headers of Python"
)


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
    assert net.network.stages[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)


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


@needs_compiler
def test_a_compiled_run_follows_the_same_run_without(tmp_path: Path) -> None:
    """With all that may meet a compiler: frozen layers, recomputed activations, and each step's monitors."""
    short = ("logger=csv", "trainer.max_epochs=1", "+trainer.limit_train_batches=4", "+trainer.limit_val_batches=1")
    short += ('freeze=["network.stem*"]', 'checkpoint_activations=["*stages.1"]', "test=false")
    plain = train(tmp_path, *short, "run.id=plain").ended()
    compiled = train(tmp_path, *short, "compile=true", "run.id=compiled", timeout=170).ended()
    states = [
        torch.load(each.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for each in (plain, compiled)
        if each.directory is not None
    ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-5)
    assert states[1]["network.stages.1.bn1.num_batches_tracked"] == 4
