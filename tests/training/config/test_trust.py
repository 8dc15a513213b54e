"""The config.yaml of another run does not decide what is called, imported, opened or read from the environment."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from syncbn.training.checkpoint import inherit_config
from syncbn.training.config import trust
from syncbn.training.config.schema import Config
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.launch import rank
from syncbn.training.run_directory import record
from tests.training.support.settled_config import composed, settled
from tests.training.support.train_command import train

# Each builds a part of a network, or of its training, and does nothing else.
SAFE = [
    *("syncbn.training.MLP", "syncbn.training.models.networks.ResNet"),
    *("syncbn.training.Classifier", "syncbn.training.Cosine"),
    *("syncbn.SyncBatchNorm2d", "torch.nn.Linear", "torch.nn.modules.linear.Linear", "torch.nn.Sequential"),
    *("torch.optim.AdamW", "torch.optim.sgd.SGD", "torch.optim.lr_scheduler.ConstantLR"),
]
# The same packages reach everything: by a function, a module that they import, or a method.
UNSAFE = [
    *("pandas.read_pickle", "builtins.eval", "os.system", "subprocess.run", "functools.partial", "pathlib.Path"),
    *("hydra.utils.instantiate", "hydra.utils.get_class", "hydra.utils.get_method", "lightning.pytorch.Trainer"),
    *("torch.load", "torch.hub.load", "torch.ops.load_library", "torch.classes.load_library", "torch.os.system"),
    *("torch.serialization.load", "torch.jit.load", "torch.utils.cpp_extension.load", "torch.fx.GraphModule"),
    *("torch.nn.modules.module.torch.load", "torch.nn.modules.module.functools.partial", "torch.nn.Parameter"),
    *("torch.nn.init.normal_", "torch.nn.functional.relu", "torch.nn.Linear.load_state_dict", "torch.nn"),
    *("torch.nn.Linear.__init__", "torch.nn.modules.__builtins__.eval", "torch.nn.modules.module.OrderedDict"),
    *("torch.optim.lr_scheduler.warnings.warn", "torch.distributed.init_process_group", "torch.nn.NoSuchLayer"),
    *("syncbn.training.config.validate.os.system", "syncbn.training.run_directory.record.subprocess.run"),
    "syncbn.training.run_directory.record.begin",
    *("syncbn.training.import_module", "syncbn.cli.main", "syncbn.training.Digits", "syncbn.training.no_such.Module"),
    *("syncbn.training.config.trust.nn.Linear", "torch.nn.modules.module.torch.nn.Linear"),
    *("torch.nn.Linear\n", "torch..nn.Linear", ".torch.nn.Linear", "", None, 5, True, ["torch.nn.Linear"]),
]
OWN = {"_target_": "mine.Net", "hidden": 8, "file": "/data/words.txt", "parts": [{"_target_": "mine.Part"}]}


@pytest.mark.parametrize("target", SAFE)
def test_classes_that_build_a_network_are_safe(target: str) -> None:
    assert trust.is_safe(target)
    assert trust.refused({"_target_": target}, None, "model") == {}


@pytest.mark.parametrize("target", UNSAFE)
def test_anything_else_is_refused_wherever_it_is(target: Any) -> None:
    assert not trust.is_safe(target)
    hidden = {"_target_": target, "command": "x"}
    for place, theirs in {
        "model._target_": hidden,
        "model.extra._target_": {"_target_": "torch.nn.Linear", "extra": hidden},
        "model.a.1.b._target_": OWN | {"a": [1, {"b": hidden}]},
        "model._args_.0._target_": {"_target_": "torch.nn.Sequential", "_args_": [hidden], "_recursive_": False},
        "model.words._target_": {"words": hidden},
    }.items():
        assert trust.refused(theirs, OWN, "model") == {place: target}


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a file behind when it is imported."""
    (tmp_path / "spied.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    assert not (tmp_path / "imported").exists()


def test_no_module_is_imported_to_find_out(spy: Path) -> None:
    assert trust.refused({"_target_": "spied.Net"}, None, "model") == {"model._target_": "spied.Net"}
    theirs = {"_target_": "torch.nn.Linear", "kind": "spied.Net"}
    assert trust.refused(theirs, None, "model") == {"model.kind": "spied.Net"}


def test_a_target_is_the_users_own_in_its_place_alone() -> None:
    assert trust.refused(OWN, OWN, "model") == {}
    assert trust.refused(OWN | {"hidden": 16, "kind": "wide-v1.5", "rates": [0.1, None]}, OWN, "model") == {}
    moved = {"_target_": "mine.Part"}
    assert trust.refused(moved, OWN, "model") == {"model._target_": "mine.Part"}
    assert trust.refused(OWN, None, "model") == {"model._target_": "mine.Net"}
    # Below a target that is not the user's own, nothing is.
    inside = {"_target_": "torch.nn.Sequential", "parts": OWN["parts"]}
    assert trust.refused(inside, OWN, "model") == {"model.parts.0._target_": "mine.Part"}
    assert trust.refused({"_target_": "torch.nn.Linear", "file": "/data/words.txt"}, OWN, "model") == {
        "model.file": "/data/words.txt"
    }


@pytest.mark.parametrize(
    "value",
    [
        *("/etc/passwd", "../other.pkl", "here", "~/x", "file:x", "https://example.com/a.pt", "hf-hub:name", "C:\\x"),
        *("os.system", "json.loads", "module:function", "lambda x: x", "__import__('os')", "$HOME", "a\nb", "x" * 300),
        *("${oc.env:HOME}", "${oc.decode:x}", "${seed}", "\x1b[31m", b"bytes", Path("x")),
    ],
)
@pytest.mark.parametrize("target", ["mine.Net", "torch.nn.Linear"])
def test_arguments_are_numbers_and_words(
    value: Any, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    own = {"_target_": "mine.Net"}
    for theirs, place in (({"x": value}, "x"), ({"x": [1, {"y": value}]}, "x.1.y"), ({"_args_": [value]}, "_args_.0")):
        assert trust.refused({"_target_": target} | theirs, own, "model") == {f"model.{place}": value}
    assert trust.refused({"_target_": target, "x": "relu"}, own, "model") == {}
    assert trust.refused({"_target_": target, "x": "torch.nn.ReLU"}, own, "model") == {}
    assert trust.refused({"_target_": target, "x": "resnet50.a1_in1k"}, own, "model") == {}


@pytest.mark.parametrize("key", ["a.b", "a[b]", "a b", "", 'a"), x("'])
def test_keys_are_words(key: str) -> None:
    assert trust.refused({"_target_": "torch.nn.ModuleDict", key: 1}, None, "model") == {f"model.{key}": 1}


def test_globs_of_layers_are_words() -> None:
    norm = {"name": "sync", "group": 2, "only": ["*layer[34]*", "head.norm"]}
    assert trust.refused(norm, {"name": "local"}, "norm") == {}
    assert trust.refused(norm | {"group": "${oc.env:HOME}"}, norm, "norm") == {"norm.group": "${oc.env:HOME}"}


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingError, match=r"^_target_=timm\.create_model: there is no package timm here; install it"):
        trust.is_safe("timm.create_model")


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A run directory from elsewhere, whose checkpoint need not be sound: nothing gets as far as that."""
    where = tmp_path / "foreign"
    record.begin(settled("model=mlp", run_dir=where), "foreign", [])
    (where / "checkpoints").mkdir()
    (where / "checkpoints/best.ckpt").touch()
    return where


def change(where: Path, group: str, settings: Any) -> None:
    file = where / "config.yaml"
    contents = yaml.safe_load(file.read_text(encoding="utf-8"))
    contents[group] = contents[group] | settings if isinstance(settings, dict) else settings
    file.write_text(yaml.safe_dump(contents), encoding="utf-8")


def take(where: Path, *overrides: str) -> Any:
    overrides = ("mode=test", f"ckpt_path={where / 'checkpoints/best.ckpt'}", *overrides)
    return inherit_config.inherited(composed(*overrides), list(overrides), lambda line: None)


def test_the_program_calls_nothing_that_another_run_names(tmp_path: Path, foreign: Path) -> None:
    (foreign / "w.pkl").write_bytes(pickle.dumps(Pickled(tmp_path / "unpickled")))
    extra = {"_target_": "pandas.read_pickle", "filepath_or_buffer": str(foreign / "w.pkl")}
    change(foreign, "model", {"extra": extra})
    ended = train(tmp_path, "mode=test", "ckpt_path=foreign/checkpoints/best.ckpt", "logger=csv").ended(1)
    assert ended.err == (
        "error: model.extra._target_=pandas.read_pickle: foreign/config.yaml sets it, and it could run code or read "
        "files here; set it yourself too, or add trust=true if you trust that file\n"
    )
    assert not (tmp_path / "unpickled").exists()
    trusted = take(foreign, "trust=true")
    with pytest.raises(Exception, match="extra"):
        rank.build(trusted.model)
    assert (tmp_path / "unpickled").exists()  # what the test above would see


def test_trust_is_not_taken_from_the_other_run(foreign: Path) -> None:
    change(foreign, "model", {"extra": {"_target_": "os.getcwd"}})
    change(foreign, "trust", True)
    with pytest.raises(AgreedError, match=r"^model\.extra\._target_=os\.getcwd: .*trust=true"):
        take(foreign)
    assert take(foreign, "trust=true").model.extra == {"_target_": "os.getcwd"}


@pytest.mark.parametrize(
    ("group", "settings", "named"),
    [
        ("model", {"width": "${oc.env:SECRET}"}, "model.width=${oc.env:SECRET}"),
        ("norm", {"group": "${oc.env:SECRET}"}, "norm.group=${oc.env:SECRET}"),
        ("norm", {"name": {"_target_": "os.getcwd"}}, "norm.name._target_=os.getcwd"),
        ("seed", "${oc.env:SECRET}", "seed=${oc.env:SECRET}"),
        ("data", {"split_seed": "${oc.env:SECRET}"}, "data.split_seed=${oc.env:SECRET}"),
        ("data", {"split_seed": "/etc/passwd"}, "data.split_seed=/etc/passwd"),
        ("data", {"_target_": "${oc.env:SECRET}"}, "data._target_=${oc.env:SECRET}"),
        ("data", {"_target_": "mine.${oc.env:SECRET}"}, "data._target_=mine.${oc.env:SECRET}"),
        ("module", {"_target_": "mine.Lit"}, "module._target_=mine.Lit"),
    ],
)
def test_what_is_refused_is_named_and_never_resolved(
    foreign: Path, group: str, settings: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2!")
    change(foreign, group, settings)
    with pytest.raises(AgreedError, match=rf"^{re.escape(named)}: \S+config\.yaml sets it") as refused:
        take(foreign)
    assert "hunter2!" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_value_of_another_type_is_named(foreign: Path) -> None:
    change(foreign, "seed", "one")
    overrides = ["mode=test", f"ckpt_path={foreign / 'checkpoints/best.ckpt'}"]
    typed = OmegaConf.merge(OmegaConf.structured(Config), composed(*overrides))  # as Hydra has it
    with pytest.raises(AgreedError, match=r"^seed=one: \S+config\.yaml sets it: Value 'one' .* Integer"):
        inherit_config.inherited(typed, overrides, lambda line: None)


@pytest.mark.parametrize("network", [{"_target_": "os.getcwd"}, [{"_target_": "os.getcwd"}], "os.getcwd", None])
def test_the_network_of_a_module_is_the_model(foreign: Path, network: Any) -> None:
    change(foreign, "module", {"_target_": "syncbn.training.models.classifier.Classifier", "network": network})
    cfg = take(foreign)
    assert cfg.module._target_ == "syncbn.training.models.classifier.Classifier"
    assert cfg.module.network == cfg.model
    assert "os.getcwd" not in OmegaConf.to_yaml(cfg, resolve=True)


def test_several_are_named_in_one_line(foreign: Path) -> None:
    change(foreign, "model", {f"part{n}": {"_target_": "os.getcwd"} for n in range(5)})
    with pytest.raises(AgreedError) as refused:
        take(foreign)
    assert str(refused.value).count("_target_=os.getcwd") == 3
    assert " and 2 more: " in str(refused.value)


def test_networks_of_another_run_are_still_taken(foreign: Path) -> None:
    layers = [{"_target_": "torch.nn.Flatten"}, {"_target_": "torch.nn.Linear", "in_features": 64, "out_features": 10}]
    change(foreign, "model", {"_target_": "torch.nn.Sequential", "_args_": layers})
    cfg = take(foreign)
    assert cfg.model._target_ == "torch.nn.Sequential"
    assert cfg.module.network == cfg.model


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "[1]", "model: 1\n", "a: [", "x: !!python/object/apply:os.system [touch made]", "a: &a [*a]"),
        *("model: {}\nnorm: {}\nmodule: {}\ndata: ${oc.env:SECRET}\n", "model: ${", "\x00"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_in_one_line(
    foreign: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (foreign / "config.yaml").write_text(text, encoding="utf-8")
    for trusted in ("trust=false", "trust=true"):
        line = r"^ckpt_path=\S+: \S+config\.yaml does not hold the settings of a run \("
        with pytest.raises(AgreedError, match=line):
            take(foreign, trusted)
    assert not (tmp_path / "made").exists()
