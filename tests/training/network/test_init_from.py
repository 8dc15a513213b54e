"""A network begins with the weights of another training, under whatever names they were saved."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from syncbn.training.models.classifier import Classifier
from syncbn.training.models.networks import MLP, ResNet
from syncbn.training.network import check, init_from, weights_source
from tests.support.refuses import ANY, refuses
from tests.training.support.settled_config import composed
from tests.training.support.train_command import train


def module(network: nn.Module) -> Classifier:
    return Classifier(network, lambda groups: torch.optim.SGD(groups, lr=0.1), num_classes=10)


def lines(target: nn.Module, weights: Any, path: Path) -> list[str]:
    """What the load of a file with these contents reports."""
    torch.save(weights, path)
    printed: list[str] = []
    init_from.load(target, weights_source.located(str(path)), printed.append)
    return printed


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: each for name, each in state.items()}


class Wrapped(nn.Module):
    """A network of somebody else, with ours below another name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNet()
        self.decoder = nn.Linear(10, 2)


@pytest.mark.parametrize(
    "saved",
    [
        lambda net: net.state_dict(),
        lambda net: prefixed(net.state_dict(), "module."),
        lambda net: {"model": prefixed(net.state_dict(), "_orig_mod."), "epoch": 3},
        lambda net: {"state_dict": prefixed(net.state_dict(), "network._orig_mod."), "optimizer_states": [{}]},
        lambda net: {"state_dict": prefixed(net.state_dict(), "model.module."), "epoch": torch.zeros(())},
        lambda net: AveragedModel(net).state_dict(),
        lambda net: AveragedModel(module(net)).state_dict(),
    ],
    ids=["plain", "DDP", "compiled", "ours, compiled", "Lightning", "EMA", "EMA of the module"],
)
def test_prefixes_are_stripped(tmp_path: Path, saved: Any) -> None:
    source, target = ResNet(), module(ResNet())
    (line,) = lines(target, saved(source), tmp_path / "weights.pt")
    assert line.endswith(f"{len(source.state_dict())} of {len(target.state_dict())} tensors loaded; all fit")
    torch.testing.assert_close(target.network.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_what_does_not_fit_is_listed_and_stays_as_it_was(tmp_path: Path) -> None:
    source, target = ResNet(num_classes=5, in_channels=3), module(ResNet())
    head = target.network.head.weight.clone()
    state = source.state_dict() | {"aux.weight": torch.zeros(3)}
    del state["stages.2.bn1.bias"]
    (line,) = lines(target, state, tmp_path / "weights.pth")
    for words in (
        "missing: network.stages.2.bn1.bias;",
        "unexpected: aux.weight;",
        "other shape, left as initialized: network.head.weight 5x64 for 10x64, network.head.bias 5 for 10",
        "adapted to the input channels: network.stem.0.weight",
    ):
        assert words in line
    assert torch.equal(target.network.head.weight, head)
    assert torch.equal(target.network.stages[1].conv1.weight, source.stages[1].conv1.weight)
    grey = torch.rand(2, 1, 8, 8)
    expected = source.stem[0](grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(target.network.stem[0](grey), expected)


def test_a_part_of_a_larger_network_is_found(tmp_path: Path) -> None:
    larger, target = Wrapped(), module(ResNet())
    (line,) = lines(target, larger.state_dict(), tmp_path / "a.pt")
    assert "tensors loaded" in line
    assert torch.equal(target.network.stem[0].weight, larger.encoder.stem[0].weight)


@pytest.mark.parametrize("other", [MLP(), ResNet(width=8), nn.Linear(3, 3)])
def test_another_architecture_is_refused(tmp_path: Path, other: nn.Module) -> None:
    with refuses("init_from", str(tmp_path / "a.pt"), "another architecture"):
        lines(module(ResNet()), other.state_dict(), tmp_path / "a.pt")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "broken.pt").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "none.pt")
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "code.pt")
    for name, words in {
        "missing.pt": "there is no such file",
        "notes.txt": "no file of weights",
        "empty": "no run",
    }.items():
        with refuses("init_from", hint := tmp_path / name if name == "empty" else str(tmp_path / name), words):
            weights_source.located(str(hint))
    for name, words in {
        "broken.pt": "no weights can be read",
        "none.pt": "no weights",
        "code.pt": "no weights",
    }.items():
        with refuses("init_from", str(tmp_path / name), words):
            weights_source.read(weights_source.located(str(tmp_path / name)))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_odd_tensors_are_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = ResNet().state_dict()
    name, path = "head.weight", tmp_path / "a.pt"
    for words, odd in (
        ("the tensor head.weight is sparse", state[name].to_sparse()),
        ("the tensor head.weight is without data (meta)", state[name].to("meta")),
        ("the tensor head.weight is quantized", torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8)),
    ):
        with refuses("init_from", str(path), words):
            lines(module(ResNet()), state | {name: odd}, path)
    (line,) = lines(module(ResNet()), state | {name: state[name].to(torch.complex64)}, path)
    assert "other shape, left as initialized: network.head.weight complex 10x64 for 10x64" in line
    itself: dict[str, Any] = {}
    itself["model"] = itself
    with refuses("init_from", str(path), "it holds no weights"):
        lines(module(ResNet()), itself, path)
    with refuses("init_from", ANY, "it is empty"):
        weights_source.located("")


def test_many_names_with_different_prefixes_take_no_time() -> None:
    start = time.process_time()
    assert init_from._prefixes([f"{each}.a.b.c" for each in range(20_000)]) == [""]
    assert time.process_time() - start < 2
    assert init_from._prefixes(["a.b.c", "a.d", "e"]) == ["", "a."]


def test_a_run_begins_with_the_best_weights_of_another_and_does_not_load_them_again(tmp_path: Path) -> None:
    short = ("logger=csv", "+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1")
    first = train(tmp_path, *short, "trainer.max_epochs=1", "run.id=first", "test=false").ended()
    same = (*short, "init_from=outputs/first", "optimizer.lr=0", "run.id=second", "test=false")
    second = train(tmp_path, *same, "trainer.max_epochs=1").ended()
    assert first.directory is not None
    assert second.directory is not None
    assert "tensors loaded; all fit" in second.out
    best = first.directory / "checkpoints" / "best.ckpt"
    assert OmegaConf.load(second.directory / "config.yaml").init_from == str(best)
    weights, theirs = (
        torch.load(each.directory / "checkpoints" / "last.ckpt", weights_only=True) for each in (first, second)
    )
    assert torch.equal(weights["state_dict"]["network.head.weight"], theirs["state_dict"]["network.head.weight"])
    best.unlink()
    resumed = train(tmp_path, *same, "trainer.max_epochs=2").ended()
    assert "resumes from" in resumed.out
    assert "tensors loaded" not in resumed.out


def test_a_test_and_a_second_source_of_weights_are_refused(tmp_path: Path) -> None:
    torch.save(ResNet().state_dict(), tmp_path / "a.pt")
    cfg = composed(f"init_from={tmp_path / 'a.pt'}", "mode=test", "ckpt_path=a")
    with refuses("init_from", str(tmp_path / "a.pt"), "mode=test"):
        check.check(_plan(cfg))
    refused = train(tmp_path, "init_from=a.pt", "ckpt_path=a.pt", "run.id=a").ended(1)
    assert "error: init_from=" in refused.err
    assert "set one of the two" in refused.err


def _plan(cfg: Any) -> Any:
    from syncbn.training.config.machine import this_machine
    from syncbn.training.config.settle import settle

    return settle(cfg, this_machine(), Path("somewhere"))
