"""A metric that the module never logs is refused before training, and nothing else is."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from syncbn.training.callbacks import monitored_metric
from syncbn.training.errors import AgreedError
from syncbn.training.models.classifier import Classifier
from tests.support.refuses import refuses
from tests.training.support.train_command import PROJECT, train
from tests.training.support.user_project.mine import Lit, Probe

KIND = "lightning.pytorch.callbacks.ModelCheckpoint"
SETTINGS = OmegaConf.create(
    {
        "checkpoint": {"_target_": KIND, "monitor": "val/acc"},
        "other": {},
        "none": {"_target_": KIND, "monitor": None},
        "own": {"_target_": "tests.training.support.user_project.mine.Probe", "monitor": "gpu"},
        "missing": {"_target_": "no_such_package.Probe", "monitor": "gpu"},
    }
)


class Constants(pl.LightningModule):
    def training_step(self, batch: Any) -> None:
        self.log("train_loss", math.log(2.0), on_step=True)
        self.logger.experiment.log({"x": 1})  # type: ignore[union-attr]

    def validation_step(self, batch: Any) -> None:
        self.log_dict({"val_loss": 1.0, "val_accuracy": 0.5})


class Child(Constants):
    pass


class Staged(pl.LightningModule):
    def step(self, stage: str) -> None:
        self.log(f"{stage}/accuracy", 1.0)


class AnyName(pl.LightningModule):
    def step(self, name: str) -> None:
        self.log(name, 1.0)


class Prefixed(pl.LightningModule):
    def step(self, name: str) -> None:
        self.log(f"{name}", 1.0)


class ADict(pl.LightningModule):
    def step(self, metrics: Any) -> None:
        self.log_dict(metrics)


class HandsOver(pl.LightningModule):
    def step(self) -> None:
        print("nothing", self)


class Kept(pl.LightningModule):
    def step(self) -> None:
        write = self.log
        write("val/acc", 1.0)


class Nothing(pl.LightningModule):
    def step(self) -> None:
        super().__init__()
        assert isinstance(self, pl.LightningModule)


class Within(Nothing):
    def __init__(self) -> None:
        super().__init__()
        self.part = AnyName()


class LogsToo(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("val/acc", 1.0)


def check(module: pl.LightningModule, *callbacks: pl.Callback, monitor: str = "val/acc") -> None:
    settings = OmegaConf.merge(SETTINGS, {"checkpoint": {"monitor": monitor}})
    monitored_metric.check(module, callbacks, settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Constants, Child])
def test_it_is_refused_with_those_that_are_logged(kind: type[pl.LightningModule]) -> None:
    hint = (
        "the module does not log it, but train_loss, val_accuracy, val_loss; use callbacks.checkpoint.monitor=val_acc"
    )
    with refuses("callbacks.checkpoint.monitor", "val/acc", hint, kind=AgreedError):
        check(kind())
    with refuses(
        "callbacks.checkpoint.monitor", "val/loss", "=val_loss callbacks.checkpoint.mode=min", kind=AgreedError
    ):
        check(kind(), monitor="val/loss")
    for good in ("val_loss", "train_loss_epoch", "val_accuracy/dataloader_idx_1", "epoch", "lr-SGD"):
        check(kind(), monitor=good)


def test_a_name_with_a_computed_part_may_have_any_text_there() -> None:
    check(Staged(), monitor="val/accuracy")
    with refuses(
        "callbacks.checkpoint.monitor",
        "val/acc",
        "but val/accuracy; use callbacks.checkpoint.monitor=val/accuracy",
        kind=AgreedError,
    ):
        check(Staged())
    with refuses("callbacks.checkpoint.monitor", "val/acc", "the module logs no metric", kind=AgreedError):
        check(Nothing())


@pytest.mark.parametrize("kind", [AnyName, Prefixed, ADict, HandsOver, Kept, Within])
def test_what_the_source_does_not_show_is_accepted(kind: type[pl.LightningModule]) -> None:
    check(kind())


def test_callbacks_log_too_and_ours_do_not() -> None:
    check(Constants(), LogsToo())
    check(Lit(4, 0.1), Probe("a"))
    names = set().union(*filter(None, monitored_metric.logged([Classifier])))
    assert {"{stage}/acc", "{stage}/loss", "train/loss"} <= names


def test_no_more_classes_are_parsed_than_until_the_metric_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[type] = []
    logged_by = monitored_metric._logged_by
    monkeypatch.setattr(monitored_metric, "_logged_by", lambda kind: parsed.append(kind) or logged_by(kind))
    check(Child(), LogsToo(), monitor="val_loss")
    assert parsed == [Child, Constants]
    check(Child(), monitor="epoch")
    assert len(parsed) == 2
    check(Child(), LogsToo())
    assert parsed[2:] == [Child, Constants, LogsToo]


def test_lightnings_error_after_an_epoch_names_the_setting() -> None:
    error = MisconfigurationException(
        "`ModelCheckpoint(monitor='val/acc')` could not find the monitored key in the returned metrics: ['a']."
    )
    found = monitored_metric.explained(error, SETTINGS, ["a", "val_acc"])
    assert found is not None
    assert (found.setting, found.value) == ("callbacks.checkpoint.monitor", "val/acc")
    assert "but a, val_acc; use callbacks.checkpoint.monitor=val_acc" in found.hint
    assert monitored_metric.explained(MisconfigurationException("another"), SETTINGS, []) is None


def test_a_run_is_refused_before_its_first_epoch(tmp_path: Path) -> None:
    mine = ("--config-dir", f"{PROJECT}/conf", "model=mine", "data=mine", "module=mine", "logger=csv")
    run = train(tmp_path, *mine, "callbacks.checkpoint.monitor=val/f1").ended(1)
    hint = "the module does not log it, but mine, val/acc; use callbacks.checkpoint.monitor=val/acc"
    assert run.err == f"error: callbacks.checkpoint.monitor=val/f1: {hint}\n"
    assert "epoch" not in run.out
