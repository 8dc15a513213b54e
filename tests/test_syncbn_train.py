"""``syncbn train`` is ``train.py``: in any directory, with the user's own files, under every launcher."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.support import train_command
from tests.training.support.train_command import Run, handles_signals

COMMAND = [sys.executable, "-m", "syncbn", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "syncbn", "train"]
SHORT = ("trainer.max_epochs=1", "logger=csv", "trainer.devices=2")
NETWORK = """
import helper
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes: int, hidden: int) -> None:
        layers = nn.Flatten(), nn.Linear(64, hidden, bias=False), nn.BatchNorm1d(hidden), nn.Linear(hidden, num_classes)
        super().__init__(*layers)
        assert helper.HERE
"""


def syncbn_train(where: Path, *arguments: str, command: list[str] = COMMAND, **options: Any) -> Run:
    env = train_command.environment()
    env["PYTHONPATH"] = str(train_command.REPO)  # and no directory of the user's
    env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # of a notebook; its package is not here
    return train_command.run(where, *command, *arguments, env=env, **({"timeout": 120} | options))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a network, a file beside ``--config-dir``, and files with the names of others."""
    (tmp_path / "own_network.py").write_text(NETWORK, encoding="utf-8")
    conf = tmp_path / "elsewhere/conf"
    (conf / "model").mkdir(parents=True)
    text = "_target_: own_network.Net\nnum_classes: 10\nhidden: 8\n"
    (conf / "model/net.yaml").write_text(text, encoding="utf-8")
    (conf.parent / "helper.py").write_text("HERE = True\n", encoding="utf-8")
    for name in ("random.py", "sklearn.py", "lightning.py"):
        (tmp_path / name).write_text(f"raise RuntimeError('{name} of the current directory')\n", encoding="utf-8")
    for name in ("wandb", "torch", "outputs"):
        (tmp_path / name).mkdir()
    return tmp_path


OWN = ("--config-dir", "elsewhere/conf", "model=net", *SHORT)


def test_own_files_need_no_path_and_hide_no_others(project: Path) -> None:
    ran = syncbn_train(project, *OWN, "run.id=a", fresh=True).ended()
    assert "test accuracy" in ran.out
    assert ran.json("run")["command"] == [*COMMAND, *OWN, "run.id=a"]
    more = [each.replace("max_epochs=1", "max_epochs=2") for each in OWN]
    assert "epoch 2/2" in syncbn_train(project, *more, "run.id=a").ended().out
    tested = syncbn_train(project, *OWN, "mode=test", "ckpt_path=outputs/a/checkpoints/best.ckpt").ended()
    assert "test accuracy" in tested.out


def test_torchrun_runs_it(project: Path) -> None:
    ran = syncbn_train(project, *OWN, command=TORCHRUN).ended()
    assert ran.json("run")["world_size"] == 2


def test_a_sweep_runs_it(project: Path) -> None:
    ran = syncbn_train(project, "-m", *OWN, "seed=0,1", "hydra.sweep.dir=sweep").ended()
    assert ran.out.count("finished") == 2


def test_a_signal_has_the_exit_code_and_hint_of_the_command(project: Path) -> None:
    def interrupt(leader: int) -> None:
        while not list(project.glob("outputs/a/checkpoints/last.ckpt")):
            time.sleep(0.01)
        os.kill(leader, signal.SIGTERM)

    ran = syncbn_train(project, *OWN[:3], "trainer.max_epochs=500", "logger=csv", "run.id=a", meanwhile=interrupt)
    assert ran.ended(143).err.splitlines()[-1] == (
        "error: stopped by SIGTERM; resume with: python -m syncbn train --config-dir elsewhere/conf model=net "
        "trainer.max_epochs=500 logger=csv run.id=a"
    )
    assert not ran.left


def test_a_signal_before_the_imports_is_one_line(tmp_path: Path) -> None:
    def interrupt(leader: int) -> None:
        while not handles_signals(leader):
            time.sleep(0.01)
        os.kill(leader, signal.SIGINT)

    ran = syncbn_train(tmp_path, fresh=True, meanwhile=interrupt)
    assert (ran.code, ran.err) == (130, "error: stopped by SIGINT\n")


def test_a_foreign_run_directory_executes_nothing(tmp_path: Path) -> None:
    trained = syncbn_train(tmp_path, *SHORT, "model=mlp", "run.id=theirs").ended()
    assert trained.directory is not None
    foreign = trained.directory
    (foreign / "run.json").unlink()
    planted = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"
    for name in ("timm", "torchvision", "theirs", "cupy"):
        (foreign / f"{name}.py").write_text(planted, encoding="utf-8")
    config = (foreign / "config.yaml").read_text(encoding="utf-8")
    for target in ("timm.create_model", "theirs.Net"):
        text = config.replace("syncbn.training.MLP", target)
        (foreign / "config.yaml").write_text(text, encoding="utf-8")
        options = ("mode=test", "ckpt_path=checkpoints/best.ckpt", "logger=csv", f"hydra.run.dir={tmp_path}/tested")
        ran = syncbn_train(foreign, *options).ended(1)
        assert f"model._target_={target}: " in ran.err or f"_target_={target}: there is no package" in ran.err
    assert not (foreign / "executed").exists()
