"""A setting that nothing reads is refused: at the top level, in a group, and as an argument of any target."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from syncbn.training.composition import unread_settings
from syncbn.training.launch import main  # noqa: F401  # registers what conf/ names
from tests.support import read_once
from tests.support.refuses import ANY, refuses
from tests.training.support.train_command import PROJECT, REPO

read_once.install()


def check(*overrides: str, searched: Path = PROJECT / "conf") -> None:
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        composed = compose("config", [*overrides, f"hydra.searchpath=[file://{searched}]"], return_hydra_config=True)
        hydra = composed.hydra
        cfg = composed.copy()
        cfg._set_flag("struct", False)  # as hydra.main does it, the settings lack Hydra's own
        del cfg.hydra
        unread_settings.check(cfg, hydra)


BAD = {
    "+optimzer.lr=0.1": ("optimzer.lr", 0.1, "the nearest is optimizer.lr"),
    "+foo=1": ("foo", 1, "no part of the program reads this setting; python train.py --help lists them"),
    "++foo.bar=1": ("foo.bar", 1),
    "+max_epochs=3": ("max_epochs", 3, "the nearest is trainer.max_epochs"),
    "+optimizer.learning_rate=1": ("optimizer.learning_rate", 1, "torch.optim.SGD has no", "nearest is optimizer.lr"),
    "+model.typo=1": (
        "model.typo",
        1,
        "ResNet has no argument typo; there are blocks, in_channels, num_classes, width",
    ),
    "+model.widht=1": ("model.widht", 1, "the nearest is model.width"),
    "+module.x=1": ("module.x", 1),
    "+data.x=1": ("data.x", 1),
    "+scheduler.x=1": ("scheduler.x", 1),
    "+callbacks.checkpoint.typo=1": ("callbacks.checkpoint.typo", 1),
    "+callbacks.checkpoint.save_topk=1": ("callbacks.checkpoint.save_topk", 1, "callbacks.checkpoint.save_top_k"),
    "corruptions=suite +corruptions.x=1": ("corruptions.x", 1),
    "+trainer.typo=1": ("trainer.typo", 1),
    "+trainer.max_epoch=1": ("trainer.max_epoch", 1, "the nearest is trainer.max_epochs"),
    "+norm.x=1": ("norm.x", 1, "norm=sync has no such setting"),
    "norm=ghost +norm.num_groups=1": ("norm.num_groups", 1),
    "+logger.projct=1": ("logger.projct", 1, "the nearest is logger.project"),
    "logger=csv +logger.mode=offline": ("logger.mode", "offline"),
    "logger=[wandb,mlflow] +logger.mlflow.experimnt=x": ("logger.mlflow.experimnt", "x", "logger.mlflow.experiment"),
    "+logger.mine.flush=1": ("logger.mine", {"flush": 1}),
    "+logger._target_=lightning.pytorch.loggers.CSVLogger": ("logger._target_", ANY, "logger.NAME._target_=CLASS"),
    "+resume.kep=1": ("resume.kep", 1, "the nearest is resume.keep"),
    "+run.x=1": ("run.x", 1, "there is run.id"),
    "model=mine +model.hiden=3": ("model.hiden", 3, "mine.Net has no argument hiden; the nearest is model.hidden"),
    "+callbacks.mine._target_=mine.Probe +callbacks.mine.pth=a": ("callbacks.mine.pth", "a", "callbacks.mine.path"),
    "~logger": ("logger", None, "a run needs this group of settings"),
    "~norm": ("norm", None, "a run needs this group of settings"),
    "~trainer": ("trainer", None, "a run needs this group of settings"),
    "model._target_=nope": ("model._target_", "nope", "names no class; write module.Class"),
    "model._target_=[a]": ("model._target_", ["a"], "names no class"),
    "model._target_=.x": ("model._target_", ".x", "names no class"),
    "model._target_=no_such_package.Net": ("model._target_", "no_such_package.Net", "there is no module no_such"),
    "+callbacks.x=3": ("callbacks.x", 3, "a callback has settings"),
    "optimizer=adamw +optimizer.nesterov=true": ("optimizer.nesterov", True),
}


@pytest.mark.parametrize("overrides", BAD)
def test_it_is_refused_with_the_nearest(overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROJECT))
    setting, value, *words = BAD[overrides]
    with refuses(setting, value, *words):
        check(*overrides.split())


GOOD = [
    "",
    "logger=[wandb,csv,tensorboard,mlflow] logger.mode=online logger.project=x logger.mlflow.experiment=y",
    "logger=csv +logger.mine._target_=lightning.pytorch.loggers.CSVLogger +logger.mine.save_dir=a",
    *("+width=3 model.width=${width}", "+a.b=3 model.width=${oc.select:a.b,3}", "+a=x hydra.sweep.dir=${a}"),
    *("+optimizer.maximize=true", "+trainer.limit_train_batches=2", "+trainer.strategy=ddp"),
    *(
        "+run.tag=x hydra.run.dir=outputs/${run.tag}",
        "+trainer.more=3 +run.tag=${..trainer.more} +a=${run.tag} seed=${a}",
    ),
    *(
        "model._target_=math.sqrt +model.x=1",
        "+callbacks.x=null",
        "~callbacks",
        "~scheduler",
        "data=mine +data.num_classes=10 +data.in_channels=1",
    ),
    *("+callbacks.more={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/acc, patience: 2}",),
    *("model=mine", "model=mine data=mine module=mine"),
]


@pytest.mark.parametrize("overrides", GOOD)
def test_what_is_read_or_cannot_be_judged_is_accepted(overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROJECT))
    check(*(overrides.split() if "{_target_" not in overrides else [overrides]))


CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in sorted((REPO / "conf").glob("*/*.yaml"))
    if path.parent.name not in ("study", "hydra")
    and path.stem != "search"  # needs Optuna's sweeper: tests/extras/test_search.py runs it
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_of_conf_has_only_settings_that_are_read(choice: str) -> None:
    check(choice)


def test_a_cluster_of_the_users_has_a_setting_that_others_read(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    text = "name: local\nroot: /scratch\nruns: ${.root}/runs\n"
    (tmp_path / "cluster/mine.yaml").write_text(text, encoding="utf-8")
    check("cluster=mine", "hydra.run.dir=${cluster.runs}", searched=tmp_path)
    with refuses("cluster.runs", ANY, "cluster=mine has no such setting"):
        check("cluster=mine", searched=tmp_path)


def test_a_key_in_a_file_of_the_users_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("defaults: [sgd]\nmomentun: 0.5\n", encoding="utf-8")
    with refuses("optimizer.momentun", 0.5, "the nearest is optimizer.momentum"):
        check("optimizer=mine", searched=tmp_path)
