"""``model=timm`` and ``model=torchvision``: any network by its name, with every norm, resumed, tested and refused."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.config import trust
from syncbn.training.models import libraries
from syncbn.training.network import init_from, prepare, weights_source
from syncbn.training.norm import replace, simulated_devices
from tests.support.refuses import refuses
from tests.training.support.train_command import train

TIMM, TORCHVISION = ({"_target_": target, "name": "resnet18"} for target in trust.BY_NAME)
NAMES = [
    *(("timm", name) for name in ("resnet18", "efficientnet_b0", "mobilenetv3_small_050", "vit_tiny_patch16_224")),
    *(("torchvision", name) for name in ("resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5")),
]  # fmt: skip
BUILDERS = {"timm": libraries.timm_network, "torchvision": libraries.torchvision_network}


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_classes_and_channels_are_those_of_the_data(package: str, name: str) -> None:
    size = 224 if "vit" in name else 64
    for channels in (1, 3):
        net = BUILDERS[package](name, 7, channels).eval()
        assert net(torch.randn(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("package", "name", "words"),
    [
        ("timm", "resnet81", "the nearest are resnet18"),
        ("timm", "resnet18.no_such", "resnet18.a1_in1k"),
        ("timm", "zzz", "the nearest are"),
        ("timm", "hf-hub:somebody/net", "no such network"),
        ("torchvision", "resnt50", "resnet50"),
        ("torchvision", "fcn_resnet50", "no such network"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(package: str, name: str, words: str) -> None:
    with refuses("model.name", name, words):
        libraries.check({"_target_": f"syncbn.training.{package}_network", "name": name})


def test_the_names_are_those_of_the_packages() -> None:
    """They are read from the packages' source, since an import takes seconds."""
    import timm
    import torchvision

    assert set(libraries.REGISTERED.findall(libraries._source("timm"))) == set(timm.list_models())
    names = torchvision.models.list_models(module=torchvision.models)
    assert set(libraries.REGISTERED.findall(libraries._source("torchvision"))) == set(names)
    for name in timm.list_models(pretrained=True)[::50]:
        libraries.check_name("timm", name)


def test_a_missing_package_and_another_argument_are_refused() -> None:
    with refuses("model", "no_such_package", "pip install"):
        libraries.check_name("no_such_package", "resnet18")
    with refuses("model.name", "resnet18", "no_such_argument"):
        libraries.timm_network("resnet18", no_such_argument=1)


def test_weights_of_colours_become_those_of_grey_images() -> None:
    """torchvision's weights, as they come without a download."""
    weights, net = (
        libraries.torchvision_network("resnet18", 1000).state_dict(),
        libraries.torchvision_network("resnet18", 7, 1),
    )
    head = net.fc.weight.clone()
    libraries.load_fitting(net, weights)
    torch.testing.assert_close(net.conv1.weight, weights["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(net.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    assert torch.equal(net.fc.weight, head)


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with refuses("model.pretrained", True, "no network"):
        libraries.torchvision_network("resnet18", pretrained=True)
    with refuses("init_from", "torchvision:resnet18", "no network"):
        weights_source.read(weights_source.located("torchvision:resnet18"))
    with refuses("init_from", "timm:resnet81", "resnet18"):
        weights_source.located("timm:resnet81")


def test_a_file_of_safetensors_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, target = libraries.timm_network("resnet18", 10, 1), nn.Module()
    target.network = libraries.timm_network("resnet18", 10, 1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    lines: list[str] = []
    init_from.load(target, weights_source.located(str(tmp_path / "model.safetensors")), lines.append)
    assert lines[0].endswith("all fit")
    assert torch.equal(target.network.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize("norm", ["none", "group_norm"])
def test_an_activation_within_a_batch_norm_layer_stays(norm: str) -> None:
    """timm's BatchNormAct2d is batch norm and activation in one layer."""
    from timm.layers import BatchNormAct2d

    net = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 32, 1), bn=BatchNormAct2d(32), last=BatchNormAct2d(32, apply_act=False))
    )
    replace.prepare_model(net, {"name": norm, "num_groups": 4, "min_channels": 1})
    assert not any(isinstance(layer, BatchNormBase) for layer in net.modules())
    x = torch.randn(2, 32, 4, 4)
    before = x.clone()
    assert (net.bn(x) >= 0).all()
    assert torch.equal(x, before)  # a block before the first convolution may use it again
    assert (net.last(x) < 0).any()
    if norm == "group_norm":
        torch.testing.assert_close(net.bn(x), nn.functional.group_norm(x, 4).relu())


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (TIMM | {"pretrained": True, "num_classes": 10, "drop_rate": 0.1}, None),
        (TORCHVISION | {"pretrained": True}, None),
        (TIMM | {"checkpoint_path": "file"}, "checkpoint_path"),
        (TIMM | {"pretrained_cfg": {"file": "file"}}, "pretrained_cfg"),
        (TIMM | {"pretrained": "file"}, "pretrained"),
        (TIMM | {"name": "local-dir:somewhere"}, "name"),
        (TORCHVISION | {"weights": "DEFAULT"}, "weights"),
    ],
)
def test_a_run_from_elsewhere_builds_a_network_and_loads_nothing(theirs: dict[str, Any], named: str | None) -> None:
    assert trust.refused(theirs, None, "model") == ({} if named is None else {f"model.{named}": theirs[named]})
    if theirs.get("pretrained"):  # elsewhere than in model it would be used
        assert trust.refused({"a": theirs}, None, "module") == {"module.a.pretrained": theirs["pretrained"]}
    built = prepare.without_pretrained(OmegaConf.create({"network": theirs})).network
    assert built.get("pretrained") is not True


@pytest.mark.parametrize(
    ("package", "name", "arguments", "words"),
    [
        ("timm", "efficientnet_b0", {}, "BatchNormAct2d) is no batch norm class of torch's"),
        ("timm", "resnet18", {"drop_rate": 0.1}, "dropout 0.1"),
        ("timm", "resnet18", {"drop_path_rate": 0.1}, "(DropPath) has dropout 0.0"),
        ("torchvision", "efficientnet_b0", {"dropout": 0.0}, "StochasticDepth"),
    ],
)
def test_what_cannot_be_simulated_is_refused(package: str, name: str, arguments: dict[str, Any], words: str) -> None:
    with refuses("simulate", None, words):
        simulated_devices.refuse(BUILDERS[package](name, 10, 1, **arguments))
    simulated_devices.refuse(libraries.timm_network("resnet18"))


def images(root: Path) -> None:
    """Two classes of random images, 40 of each."""
    from PIL import Image

    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(40):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")


def test_the_recipe_of_timms_users_is_trained_and_tested(tmp_path: Path) -> None:
    """With the settings of docs/guide/models.md, on two processes; it has BatchNormAct2d and dropout of paths."""
    images(tmp_path / "images")
    recipe = ("model=timm", "model.name=mobilenetv3_small_050", "+model.drop_path_rate=0.1", "norm=sync")
    recipe += ("augment=randaugment", "mix=mixup", "averaging.ema=0.99", "averaging.warmup=true")
    recipe += ("scheduler.warmup_epochs=1", "trainer.precision=bf16-mixed", "channels_last=true")
    data = ("data=folder", f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path}", "data.num_workers=0")
    short = ("data.batch_size=8", "trainer.max_epochs=2", "logger=csv", "run.id=a")
    run = train(tmp_path, *recipe, *data, *short).ended()
    assert (run.json("result")["steps"], run.json("result")["test"]["test/count"]) == (8, 8)
    assert run.directory is not None
    saved = torch.load(run.directory / "checkpoints" / "best.ckpt", weights_only=True)
    assert "current_model_state" in saved
    again = ("mode=test", "ckpt_path=outputs/a/checkpoints/best.ckpt", "logger=csv", "run.id=b", *recipe[-2:])
    tested = train(tmp_path, *data, *again, "data.batch_size=8").ended()
    assert "model.name=mobilenetv3_small_050" in tested.out
    assert tested.json("result")["test"]["test/loss"] == run.json("result")["test"]["test/loss"]
