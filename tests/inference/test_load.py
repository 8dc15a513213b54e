"""``syncbn.load`` returns the network that its run has tested: bitwise the same outputs, for every norm."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import syncbn
from syncbn.inference.trained import open_run
from syncbn.training.models import networks
from syncbn.training.norm.replace import prepare_model
from syncbn.training.read_file import DamagedError
from tests.inference.support.crafted_runs import HERE, MLP, Adds, Head, Own, Pair, Wraps, crafted, save, seen_something
from tests.inference.support.pictures import a_seven
from tests.inference.support.trained_runs import SEEN, assert_same_outputs, trained
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET
from tests.training.support.train_command import train

pytestmark = QUIET


def small(depth: int = 1) -> nn.Module:
    """A network, and running statistics that are not the initial ones."""
    return seen_something(networks.MLP(depth=depth, width=8), 1, 8, 8)


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings",
    [
        ["norm=sync", "channels_last=true"],
        ["norm=local", "trainer.precision=bf16-true"],
        ["norm=ghost", "checkpoint_activations=[*stages*]", "freeze=[network.stem*]"],
        ["norm=none", "averaging.ema=0.5"],
        ["norm=group_norm", "trainer.precision=64-true"],
        ["norm=local_mean", "simulate=2", "model=mlp", "averaging.swa_from=1"],
    ],
    ids=" ".join,
)
def test_the_outputs_are_bitwise_those_of_the_test(tmp_path: Path, settings: list[str]) -> None:
    network = syncbn.load(trained(tmp_path, *settings))
    assert_same_outputs(network, tmp_path)
    assert not network.training
    assert not any("Sync" in type(each).__name__ or "Simulated" in type(each).__name__ for each in network.modules())


def test_mixed_precision_is_that_of_autocast(tmp_path: Path) -> None:
    network = syncbn.load(trained(tmp_path, "model=mlp", "trainer.precision=bf16-mixed"))
    assert {each.dtype for each in network.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outputs(network, tmp_path)


IN_A_NOTEBOOK = """
import sys
import syncbn
network = syncbn.load("outputs/a")
assert "lightning" not in sys.modules
assert "sklearn" not in sys.modules
import torch
for x, y in torch.load("seen.pt"):
    with torch.no_grad():
        assert torch.equal(network(x), y)
assert network.classes == list("0123456789")
x = network.preprocess(sys.argv[1])
print(network.classes[network(x.unsqueeze(0)).argmax()])
"""


def test_two_ranks_with_statistics_of_their_own_and_no_lightning(tmp_path: Path) -> None:
    """Of norm=local_mean the pooled statistics are loaded, which all ranks have tested with."""
    more = ["norm=local_mean", "trainer.devices=2", "trainer.max_epochs=1", "logger=csv", "run.id=a"]
    train(tmp_path, *more, SEEN % (tmp_path / "seen.pt")).ended()
    command = [sys.executable, "-c", IN_A_NOTEBOOK, str(a_seven(tmp_path / "seven.png"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "7", "")


def test_loading_leaves_the_random_numbers_alone_and_the_network_can_be_pickled(tmp_path: Path) -> None:
    net = small()
    for layer in (net.head, net.body[0]):
        layer.bfloat16()
    run = crafted(tmp_path / "a", net, MLP, trainer={"precision": "bf16-true"})
    state = torch.get_rng_state()
    network = syncbn.load(run)
    assert torch.equal(torch.get_rng_state(), state)
    again = pickle.loads(pickle.dumps(network))
    assert again(X).dtype == torch.bfloat16
    assert torch.equal(again(X), network(X))
    assert again.classes == network.classes


def test_what_is_given_may_be_a_file_a_run_or_a_directory_of_one_run(tmp_path: Path) -> None:
    net = small()
    run = crafted(tmp_path / "outputs/a", net, MLP)
    expected = net.eval()(X)
    for given in (run, str(run), run / "checkpoints/best.ckpt", tmp_path / "outputs"):
        assert torch.equal(syncbn.load(given)(X), expected)
    other = crafted(tmp_path / "outputs/b", small(), MLP)
    with refuses(str(tmp_path / "outputs"), None, "2 runs", str(other)):
        syncbn.load(tmp_path / "outputs")
    (other / "checkpoints/best.ckpt").rename(other / "checkpoints/last.ckpt")
    assert open_run(other).checkpoint == other / "checkpoints/last.ckpt"


def test_a_run_without_a_checkpoint_and_what_is_no_run(tmp_path: Path) -> None:
    run = crafted(tmp_path / "a", None, MLP)
    with refuses(str(run), None, "no checkpoint"):
        syncbn.load(run)
    (run / "run.json").write_text('{"status": "finished", "tests": "elsewhere/best.ckpt"}', encoding="utf-8")
    with refuses(str(run), None, "use that one: elsewhere/best.ckpt"):
        syncbn.load(run)
    (tmp_path / "empty").mkdir()
    with refuses(str(tmp_path / "empty"), None, "no run directory"):
        syncbn.load(tmp_path / "empty")
    with refuses(str(tmp_path / "none"), None, "no such file"):
        syncbn.load(tmp_path / "none")
    (tmp_path / "alone.ckpt").write_bytes(b"PK nothing")
    with refuses(str(tmp_path / "alone.ckpt"), None, "no checkpoint of a training run can be read from it"):
        syncbn.load(tmp_path / "alone.ckpt")
    torch.save({"weights": 1}, tmp_path / "alone.ckpt")
    os.truncate(tmp_path / "alone.ckpt", 500)
    with refuses(str(tmp_path / "alone.ckpt"), None, "it is incomplete, or was not written by torch.save"):
        syncbn.load(tmp_path / "alone.ckpt")
    os.truncate(tmp_path / "alone.ckpt", 0)
    with refuses(str(tmp_path / "alone.ckpt"), None, "it is empty"):
        syncbn.load(tmp_path / "alone.ckpt")
    torch.save({"weights": 1}, tmp_path / "alone.ckpt")
    with refuses(str(tmp_path / "alone.ckpt"), None, "no state_dict"):
        syncbn.load(tmp_path / "alone.ckpt")


def test_a_checkpoint_of_another_version_is_named_with_both_versions(tmp_path: Path) -> None:
    run = crafted(tmp_path / "a", small(depth=2), MLP)
    about = '{"status": "finished", "versions": {"syncbn": "0.0.3"}}'
    (run / "run.json").write_text(about, encoding="utf-8")
    with refuses(
        str(run / "checkpoints/best.ckpt"), None, "tensors fit", "trained with syncbn 0.0.3, installed is syncbn"
    ):
        syncbn.load(run)


@pytest.mark.parametrize(
    ("model", "why"), [(MLP | {"old": 3}, "argument 'old'"), ({"_target_": "syncbn.training.Old"}, "no such class")]
)
def test_a_network_of_another_version_is_named_with_both_versions(
    tmp_path: Path, model: dict[str, object], why: str
) -> None:
    run = crafted(tmp_path / "a", small(), model)
    about = '{"status": "finished", "versions": {"syncbn": "0.0.3"}}'
    (run / "run.json").write_text(about, encoding="utf-8")
    target = model["_target_"]
    with refuses("model._target_", target, why, f"trained with syncbn 0.0.3, installed is syncbn {syncbn.__version__}"):
        syncbn.load(run)


def test_a_checkpoint_alone_needs_the_network(tmp_path: Path) -> None:
    net = seen_something(Head(), 1, 8, 8)
    path = save(tmp_path, {f"model.{name}": each for name, each in net.state_dict().items()})
    alone = path.rename(tmp_path / "alone.ckpt")
    with refuses(str(alone), None, "network="):
        syncbn.load(alone)
    mine = Head()
    assert syncbn.load(alone, network=mine) is mine
    assert torch.equal(mine(X), net.eval()(X))
    with refuses(str(alone), None, "are not of this network"):
        syncbn.load(alone, network=Head(3))


@pytest.mark.parametrize("norm", ["none", "group_norm"])
def test_a_network_that_is_given_gets_the_norm_of_the_run(tmp_path: Path, norm: str) -> None:
    settings = {"name": norm, "num_groups": 4, "min_channels": 1}
    net = Head()
    prepare_model(net, settings)
    run = crafted(tmp_path / "a", net, {"_target_": "elsewhere.Net"}, norm=settings)
    assert torch.equal(syncbn.load(run, network=Head())(X), net.eval()(X))


def test_synchronized_layers_become_torchs_but_in_a_network_that_is_given(tmp_path: Path) -> None:
    layers = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "syncbn.SyncBatchNorm2d", "num_features": 1}]}
    net = seen_something(nn.Sequential(syncbn.SyncBatchNorm2d(1)), 1, 8, 8)
    run = crafted(tmp_path / "a", net, layers)
    assert type(syncbn.load(run)[0]) is nn.BatchNorm2d
    assert torch.equal(syncbn.load(run)(X), net.eval()(X))
    assert type(syncbn.load(run, network=nn.Sequential(syncbn.SyncBatchNorm2d(1)))[0]) is syncbn.SyncBatchNorm2d


class TestOwnModules:
    """LightningModules of a user."""

    def test_one_that_is_given_its_network_needs_no_trust(self, tmp_path: Path) -> None:
        """Only the network is built, and found among the module's weights."""
        net = small()
        module = {"_target_": f"{HERE}.Wraps", "backbone": MLP}
        run = crafted(tmp_path / "a", Wraps(net), MLP, prefix="", module=module)
        assert torch.equal(syncbn.load(run)(X), net.eval()(X))

    def test_one_that_makes_its_network_needs_trust(self, tmp_path: Path) -> None:
        lit = Own()
        seen_something(lit.net._orig_mod, 1, 8, 8)
        run = crafted(tmp_path / "a", lit, MLP, prefix="", module={"_target_": f"{HERE}.Own", "hidden": 8})
        with refuses(f"module._target_={HERE}.Own", None, "trust=True", "network="):
            syncbn.load(run)
        expected = lit.net._orig_mod.eval()(X)
        assert torch.equal(syncbn.load(run, network=Head(8))(X), expected)
        assert torch.equal(syncbn.load(run, trust=True)(X), expected)

    def test_one_that_ignores_the_network_that_it_is_given_needs_trust_too(self, tmp_path: Path) -> None:
        module = {"_target_": f"{HERE}.Own", "hidden": 8, "network": MLP}
        run = crafted(tmp_path / "a", Own(), MLP, prefix="", module=module)
        with refuses(str(run / "checkpoints/best.ckpt"), None, f"{HERE}.Own may make its network itself", "trust=True"):
            syncbn.load(run)
        assert type(syncbn.load(run, trust=True)) is Head

    def test_what_a_module_adds_to_its_network_is_named_and_can_be_loaded_too(self, tmp_path: Path) -> None:
        lit = Adds(Head())
        head = {"_target_": f"{HERE}.Head"}
        run = crafted(tmp_path / "a", lit, head, prefix="", module={"_target_": f"{HERE}.Adds", "network": head})
        assert "Head, which are not used: top.weight, top.bias" in open_run(run, trust=True).note
        whole = open_run(run, trust=True, part="")
        assert whole.note == ""
        assert torch.equal(whole.network(X), lit.eval()(X))
        assert open_run(crafted(tmp_path / "b", small(), MLP)).note == ""

    def test_one_of_several_networks_has_to_be_named(self, tmp_path: Path) -> None:
        lit = Pair()
        run = crafted(tmp_path / "a", lit, MLP, prefix="", module={"_target_": f"{HERE}.Pair"})
        with refuses("part", None, "student, teacher"):
            syncbn.load(run, trust=True)
        with refuses("part", None, "student, teacher"):
            syncbn.load(run, network=Head())
        with refuses("part", "pupil", "student, teacher"):
            syncbn.load(run, trust=True, part="pupil")
        expected = lit.teacher.eval()(X)
        assert torch.equal(syncbn.load(run, trust=True, part="teacher")(X), expected)
        assert torch.equal(syncbn.load(run, network=Head(), part="teacher")(X), expected)


# A thousand million values in ten lines.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


class TestForeignRuns:
    """A run directory from elsewhere runs no code and reads no other file."""

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"_target_": "os.system", "command": "touch executed"}, "model._target_=os.system"),
            ({"_target_": "planted.Net"}, "model._target_=planted.Net"),
            (MLP | {"width": "${oc.env:HOME}"}, "model.width=${oc.env:HOME}"),
            ({"_target_": "torch.nn.Sequential", "_args_": ["/etc/passwd"]}, "model._args_.0=/etc/passwd"),
        ],
    )
    def test_what_could_run_code_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], named: str
    ) -> None:
        (tmp_path / "planted.py").write_text("open('executed', 'w', encoding='utf-8')", encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        run = crafted(tmp_path / "a", Head(), change)
        with refuses(named, None, "could run code"):
            syncbn.load(run)
        assert not (tmp_path / "executed").exists()
        assert "planted" not in sys.modules

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (ALIASES, "values"),
            ("a: !!python/object/apply:os.system [touch executed]\n", "python/object"),
            ("x" * 2**20 + ": 1\n", "more than"),
            ("data: {}\n", "has no"),
            ("", "empty"),
        ],
        ids=["aliases", "tag", "large", "no settings", "empty"],
    )
    def test_a_damaged_config_is_one_line(self, tmp_path: Path, text: str, why: str) -> None:
        run = crafted(tmp_path / "a", Head(), MLP)
        (run / "config.yaml").write_text(text, encoding="utf-8")
        with refuses(str(run / "config.yaml"), None, why, kind=DamagedError):
            syncbn.load(run)

    def test_a_pipe_in_place_of_a_file_is_not_waited_for(self, tmp_path: Path) -> None:
        run = crafted(tmp_path / "a", Head(), MLP)
        (run / "config.yaml").unlink()
        os.mkfifo(run / "config.yaml")
        with refuses(str(run / "config.yaml"), None, "no regular file", kind=DamagedError):
            syncbn.load(run)
        (run / "checkpoints/best.ckpt").unlink()
        os.mkfifo(run / "checkpoints/best.ckpt")
        with refuses(str(run), None, "no checkpoint"):
            syncbn.load(run)


def test_classes_and_preprocessing_come_from_the_checkpoint(tmp_path: Path) -> None:
    run = crafted(tmp_path / "a", small(), MLP, data={"_target_": "my.Images"})
    state = {f"network.{name}": each for name, each in small().state_dict().items()}
    assert syncbn.load(run).classes is None
    assert syncbn.load(run).preprocess is None
    saved = {"classes": ["ant", "bee"], "mean": [0.5], "std": [0.25], "size": (6, 4), "crop_pct": 0.5, "channels": 1}
    save(run, state, Images=saved)
    network = syncbn.load(run)
    assert network.classes == ["ant", "bee"]

    image = Image.new("RGB", (40, 40), (255, 255, 255))
    assert torch.equal(network.preprocess(image), torch.full((1, 6, 4), 2.0))
    save(run, state, Images=saved | {"mean": "imagenet", "classes": [1, 2]})
    assert (syncbn.load(run).classes, syncbn.load(run).preprocess) == (None, None)
