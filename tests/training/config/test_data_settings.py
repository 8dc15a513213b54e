"""Settings of data that depend on others: refused before ranks start, with what works."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from syncbn.training.data import settings as data_settings
from tests.support.refuses import refuses
from tests.training.support.settled_config import composed

GOOD: dict[str, Any] = {
    "data": {"_target_": "x.Data", "batch_size": 4, "augment": None, "mix": None, "balance": False},
    "module": {"num_classes": 3},
    "trainer": {},
    "simulate": None,
}


def check(monkeypatch: pytest.MonkeyPatch, installed: bool = True, **groups: Any) -> None:
    monkeypatch.setattr(data_settings, "find_spec", lambda _: object() if installed else None)
    data_settings.check(OmegaConf.create({name: {**(GOOD.get(name) or {}), **each} if isinstance(each, dict) else each
                                          for name, each in {**GOOD, **groups}.items()}))  # fmt: skip


def test_what_works_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch)
    check(monkeypatch, augment={"name": "standard", "padding": 4}, mix={"name": "mixup", "mixup_alpha": 0.2})
    check(monkeypatch, module={"class_weights": [1, 2.5, 0]})
    check(monkeypatch, module={"class_weights": "balanced"})


@pytest.mark.parametrize(
    ("groups", "setting", "words"),
    [
        ({"mix": {"name": "m", "mixup_alpha": 1}, "data": {"batch_size": 3}}, "data.batch_size", "use an even number"),
        ({"augment": {"name": "a", "padding": -1}}, "augment.padding", "0 or more"),
        ({"augment": {"name": "a", "typo": 1}}, "augment.typo", "there is no such setting"),
        ({"module": {"class_weights": [1, 2]}}, "module.class_weights", "use 3 numbers, one per class"),
        ({"module": {"class_weights": [1, -2, 1]}}, "module.class_weights", "use null, balanced, or a list"),
        ({"module": {"class_weights": "some"}}, "module.class_weights", "use null, balanced, or a list"),
        (
            {"module": {"class_weights": "balanced"}, "data": {"balance": True}},
            "module.class_weights",
            "one of the two",
        ),
        (
            {"simulate": 2, "trainer": {"accumulate_grad_batches": 2}, "mix": {"name": "m", "mixup_alpha": 1}},
            "mix",
            "takes 2 batches at once",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, groups: dict[str, Any], setting: str, words: str
) -> None:
    with refuses(setting):
        check(monkeypatch, **groups)
    with pytest.raises(ValueError, match=words):
        check(monkeypatch, **groups)


def test_data_that_take_no_augmentation_and_a_missing_torchvision_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = OmegaConf.create(
        {
            "data": {"_target_": "mine.Data", "batch_size": 4},
            "module": {},
            "trainer": {},
            "augment": {"name": "standard"},
        }
    )
    with refuses("augment", "standard", "(data._target_=mine.Data) do not take it; use data=folder"):
        data_settings.check(mine)
    with refuses("mix", "mixup", "it needs torchvision, which is not installed; pip install"):
        check(monkeypatch, installed=False, mix={"name": "mixup", "mixup_alpha": 0.2})


@pytest.mark.parametrize(("kind", "source"), [("CIFAR", "cifar-100-python.tar.gz"), ("MNIST", "amazonaws.com/mnist/")])
def test_an_archive_that_is_not_there_is_refused_before_ranks_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, source: str
) -> None:
    named = {"_target_": f"syncbn.training.{kind}", "name": "cifar100"}
    with refuses("data.root", None, "it is missing", source):
        check(monkeypatch, data={**named, "root": None})
    with refuses("data.root", str(tmp_path / "no"), "there is no such file or directory", source):
        check(monkeypatch, data={**named, "root": str(tmp_path / "no")})
    check(monkeypatch, data={**named, "root": str(tmp_path)})


def test_the_root_of_cifar10_is_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    assert composed("data=cifar10").data.root == str(tmp_path)
    monkeypatch.delenv("CIFAR10")
    cfg = composed("data=cifar10")
    with refuses(
        "data.root", None, "it is missing", "cifar-10-python.tar.gz), or set the environment variable CIFAR10"
    ):
        data_settings.check(cfg)
