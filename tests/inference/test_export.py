"""``syncbn export --to torch``: the file is the network, for any number of samples; and what cannot be exported."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from syncbn import cli
from syncbn.inference import formats
from syncbn.inference.export import export, lines
from syncbn.training.models import networks
from syncbn.training.norm.replace import prepare_model
from tests.inference.support.crafted_runs import (
    HERE,
    MLP,
    Decides,
    Head,
    OneSize,
    Pair,
    Several,
    crafted,
    seen_something,
)
from tests.support.refuses import ANY, refuses

# What torch says of its own tree of arguments, when the file is used.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


def own(where: Path, network: nn.Module, **settings: object) -> Path:
    """A run of a network of the user's own."""
    model = {"_target_": f"{HERE}.{type(network).__name__}"}
    return crafted(where, seen_something(network, 1, 8, 8), model, **settings)


def digits(count: int) -> torch.Tensor:
    from syncbn.training.data.digits import Digits

    data = Digits()
    data.setup("test")
    return data.test.tensors[0][:count]


@pytest.mark.parametrize("norm", ["sync", "none"])
def test_the_file_is_the_network_for_any_number_of_samples(tmp_path: Path, norm: str) -> None:
    net = networks.ResNet(width=4)
    model = {"_target_": "syncbn.training.ResNet", "in_channels": 1, "num_classes": 10, "width": 4}
    settings = {"name": norm, "only": None}
    prepare_model(net, settings)
    run = crafted(tmp_path / "a", seen_something(net, 1, 8, 8), model, norm=settings)
    (run / "run.json").write_text('{"status": "finished", "id": "a", "versions": {"torch": "2"}}', encoding="utf-8")
    (run / "result.json").write_text('{"monitored": {"val/acc": 0.5}, "test": {"test/acc": 0.25}}', encoding="utf-8")
    said: list[str] = []
    exported = export(run, to="torch", report=said.append)
    assert (exported.path, exported.inputs) == (run / "network.pt2", "8 test images")
    assert exported.difference <= 1e-6 * exported.largest
    files = {formats.EXTRA: ""}
    program = torch.export.load(exported.path, extra_files=files).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(program(digits(count)), net.eval()(digits(count)))
    about = json.loads(files[formats.EXTRA])
    assert about["classes"] == list("0123456789")
    assert about["preprocessing"] | {"resize": None} == {
        "channels": 1, "size": [8, 8], "mean": [0.0], "std": [1.0], "crop_pct": 1.0, "resize": None
    }  # fmt: skip
    assert (about["norm"], about["run"], about["input_shape"]) == (norm, "a", ["batch", 1, 8, 8])
    assert about["metrics"] == {"val/acc": 0.5, "test/acc": 0.25}
    assert about["versions"]["trained"] == {"torch": "2"}
    assert about["versions"]["exported"]["torch"] == torch.__version__
    assert len(said) == 1
    assert "8 test images" in lines(exported)[0]


def test_half_precision_is_exported_in_float32_and_several_outputs_are_compared(tmp_path: Path) -> None:
    net = Several()
    net.head.bfloat16()
    net.float()
    run = own(tmp_path / "a", net, trainer={"precision": "bf16-true"})
    said: list[str] = []
    exported = export(run, to="torch", trust=True, out=tmp_path / "x.pt2", report=said.append)
    assert "trained in bf16-true and exported in float32" in said[0]
    found = torch.export.load(tmp_path / "x.pt2").module()(digits(3))
    assert found[1]["probabilities"].sum().item() == pytest.approx(3)
    assert exported.largest > 0


class TestRefusals:
    """One line each, and no file."""

    @pytest.fixture(autouse=True)
    def _writes_nothing(self, tmp_path: Path) -> object:
        yield
        assert not list(tmp_path.rglob("*.pt2"))
        assert not list(tmp_path.rglob(".network*"))

    def test_a_decision_by_values_names_its_line(self, tmp_path: Path) -> None:
        run = own(tmp_path / "a", Decides())
        words = "Decides cannot be exported at crafted_runs.py:", "if y.sum() > 0:", "torch.where"
        with refuses("export", None, *words):
            export(run, to="torch", trust=True)

    def test_a_fixed_batch_size(self, tmp_path: Path) -> None:
        net = OneSize()
        run = crafted(tmp_path / "a", net, {"_target_": f"{HERE}.OneSize"})
        with refuses("export", None, "one batch size only"):
            export(run, to="torch", trust=True)

    def test_a_file_that_computes_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = crafted(tmp_path / "a", seen_something(networks.MLP(depth=1, width=8), 1, 8, 8), MLP)
        right = formats.FORMATS["torch"]
        wrong = right._replace(runner=lambda path: lambda x: [right.runner(path)(x)[0] * (1 + 1e-3)])
        monkeypatch.setitem(formats.FORMATS, "torch", wrong)
        with refuses("--to", "torch", "something else", "8 test images", "nothing was written"):
            export(run, to="torch")
        monkeypatch.setitem(formats.FORMATS, "torch", right._replace(runner=lambda path: lambda x: [torch.tensor([])]))
        with refuses("export", None, "other shapes"):
            export(run, to="torch")

    def test_files_and_shapes_that_cannot_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = crafted(tmp_path / "a", networks.MLP(depth=1, width=8), MLP, data={"_target_": "my.Images"})
        with refuses("--to", "tflite", "onnx, torch"):
            export(run, to="tflite")
        with refuses("--out", tmp_path, "a directory"):
            export(run, to="torch", out=tmp_path)
        with refuses("--out", tmp_path / "none/x.pt2", "no directory"):
            export(run, to="torch", out=tmp_path / "none/x.pt2")
        with refuses("--shape", None, "--shape 3,224,224"):
            export(run, to="torch")
        for shape in ("3,a", "0,3", ""):
            with refuses("--shape", shape, "sizes of one input"):
                export(run, to="torch", shape=shape)
        with refuses("export", None, "cannot be exported at networks.py"):
            export(run, to="torch", shape="3,7,7")
        empty = crafted(tmp_path / "b", None, MLP)
        with refuses(str(empty), None, "no checkpoint"):
            export(empty, to="torch")
        monkeypatch.setattr(formats, "find_spec", lambda name: None)
        with refuses("--to", "onnx", "pip install onnx onnxscript onnxruntime", "--to torch"):
            export(run)

    def test_the_network_of_a_foreign_run(self, tmp_path: Path) -> None:
        run = own(tmp_path / "a", Head())
        with refuses(f"model._target_={HERE}.Head", None, "--trust"):
            export(run, to="torch")
        with refuses("part", None, "student, teacher"):
            export(
                crafted(tmp_path / "b", Pair(), MLP, prefix="", module={"_target_": f"{HERE}.Pair"}),
                to="torch",
                trust=True,
            )


def test_a_file_is_not_replaced_unasked_and_never_through_a_link(tmp_path: Path) -> None:
    run = crafted(tmp_path / "a", networks.MLP(depth=1, width=8), MLP, data={"_target_": "my.Images"})
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    (run / "network.pt2").symlink_to(victim)
    with refuses("--out", ANY, "--overwrite"):
        export(run, to="torch", shape="1,8,8")
    exported = export(run, to="torch", shape="1,8,8", overwrite=True)
    assert exported.inputs == "8 random inputs"
    assert victim.read_text(encoding="utf-8") == "precious"
    assert not exported.path.is_symlink()


def test_without_its_data_a_run_is_compared_on_random_inputs(tmp_path: Path) -> None:
    net = networks.ResNet(in_channels=3, width=4)
    model = {"_target_": "syncbn.training.ResNet", "in_channels": 3, "num_classes": 10, "width": 4}
    data = {"_target_": "syncbn.training.CIFAR", "root": str(tmp_path / "gone"), "name": "cifar10"}
    run = crafted(tmp_path / "a", net, model, data=data)
    path = run / "checkpoints/best.ckpt"
    checkpoint = torch.load(path) | {"CIFAR": {"classes": ["a"] * 10, "mean": [0.5] * 3, "std": [0.2] * 3}}
    torch.save(checkpoint, path)
    said: list[str] = []
    assert export(run, to="torch", report=said.append).inputs == "8 random inputs"
    assert said[1].startswith("no test images: data.root=")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run = crafted(tmp_path / "a", networks.MLP(depth=1, width=8), MLP)
    cli.app(["export", "a", "--to", "torch"], standalone_mode=False)
    out = capsys.readouterr()
    assert out.err == ""
    first, compared, written = out.out.splitlines()
    assert first == "network of a/checkpoints/best.ckpt"
    assert compared.startswith("compared on 8 test images, one by one and together: largest difference ")
    assert written.startswith("written: a/network.pt2 (")
    assert run.joinpath("network.pt2").stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(SystemExit, match="1"):
        cli.app(["export", "a", "--to", "torch"], standalone_mode=False)
    line = "error: --out=a/network.pt2: there is such a file; use another name, or --overwrite\n"
    assert capsys.readouterr() == ("", line)
    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(SystemExit, match="1"):
        cli.app(["export", "a", "--to", "torch", "--out", "x.pt2"], standalone_mode=False)
    assert capsys.readouterr().err.startswith("error: --out: .x.pt2: No space left on device")


def full(path: Path, *_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
