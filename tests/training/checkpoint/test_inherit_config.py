"""A test alone is of the network that was trained, on the images that were left for the test."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from syncbn.training.checkpoint import inherit_config
from syncbn.training.config.machine import this_machine
from syncbn.training.config.settle import settle
from syncbn.training.errors import SettingError
from syncbn.training.run_directory import record
from tests.training.support.settled_config import composed, settled

PREFIX = r"^ckpt_path=\S*best\.ckpt: its run has "


def taken(where: Path, trained: list[str], *now: str) -> tuple[Any, list[str]]:
    """The settings of a test of a checkpoint of this run, and what was said about them."""
    record.begin(settled(*trained, run_dir=where), "base", [])
    said: list[str] = []
    overrides = ["mode=test", f"ckpt_path={where / 'checkpoints/best.ckpt'}", *now]
    cfg = inherit_config.inherited(composed(*overrides), overrides, said.append)
    return settle(cfg, this_machine(), where).cfg, said


def test_what_was_not_said_is_as_it_was_in_the_run(tmp_path: Path) -> None:
    trained = ["model=mlp", "model.activation=tanh", "model.num_classes=12", "norm=group_norm", "norm.num_groups=4"]
    trained += ["module.label_smoothing=0.1", "data.split_seed=1", "data.test_fraction=0.3", "seed=5", "optimizer.lr=1"]
    cfg, said = taken(tmp_path, trained, "data.corruption=shift")
    before = OmegaConf.load(tmp_path / "config.yaml")
    for group in ("model", "norm"):
        assert cfg[group] == before[group]
    assert (cfg.module.label_smoothing, cfg.module.num_classes, cfg.module.network) == (0.1, 12, before.model)
    assert (cfg.data.split_seed, cfg.data.test_fraction, cfg.seed, cfg.data.seed) == (1, 0.3, 5, 5)
    assert (cfg.data.corruption, cfg.optimizer.lr) == ("shift", 0.05)
    assert len(said) == 1
    assert said[0].startswith("taken from the run of the checkpoint: model._target_=syncbn.training.MLP ")
    assert " model.activation=tanh " in said[0]
    repeated = ["model=mlp", "model.activation=tanh", "norm=group_norm", "norm.num_groups=4", "seed=5"]
    assert taken(tmp_path, trained, *repeated, "data.corruption=shift")[0] == cfg


def test_how_many_share_statistics_may_be_said_anew(tmp_path: Path) -> None:
    trained = ["simulate=4", "data.batch_size=8", "norm.batch_size=16"]
    assert taken(tmp_path, trained, "simulate=2", "data.batch_size=16")[0].norm.ghost_batch is None
    assert taken(tmp_path, trained, "simulate=2", "data.batch_size=16")[0].norm.group == 1
    assert taken(tmp_path, trained, "simulate=3", "norm.batch_size=null")[0].norm.group == "world"


def test_how_many_images_are_tested_may_be_said_anew(tmp_path: Path) -> None:
    trained = ["data=cifar10", f"data.root={tmp_path}", "data.train_images=20", "data.test_images=10"]
    same = ("data=cifar10", f"data.root={tmp_path}")
    cfg, _ = taken(tmp_path, trained, *same)
    assert (cfg.data.train_images, cfg.data.test_images) == (20, 10)
    cfg, _ = taken(tmp_path, trained, *same, "data.test_images=30")
    assert (cfg.data.train_images, cfg.data.test_images) == (20, 30)


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (
            ["model=mlp", "model.activation=relu", "data.split_seed=0"],
            r"model\.activation=tanh data\.split_seed=1, and",
        ),
        (["model=resnet"], r"model\._target_=syncbn\.training\.MLP, and its test has to have the same; leave out what"),
        (["norm=local"], r"norm\.name=none, and"),
        (["module.decay_norm=true"], r"module\.decay_norm=false, and"),
        (["seed=1"], r"seed=2, and"),
        (["data=imagenet"], r"data\._target_=syncbn\.training\.Digits, and .* the same; set data= as that run did$"),
    ],
)
def test_what_contradicts_the_run_is_refused(tmp_path: Path, now: list[str], line: str) -> None:
    trained = ["model=mlp", "model.activation=tanh", "norm=none", "data.split_seed=1", "seed=2"]
    with pytest.raises(SettingError, match=PREFIX + line):
        taken(tmp_path, trained, *now)


def test_a_checkpoint_of_no_run_takes_nothing(tmp_path: Path) -> None:
    overrides = ["mode=test", f"ckpt_path={tmp_path / 'best.ckpt'}"]
    assert inherit_config.inherited(composed(*overrides), overrides, pytest.fail) == composed(*overrides)
