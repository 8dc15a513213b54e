"""In a locale of ASCII, and with names that are in no encoding, the program works, or says in a line what does not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from syncbn.study.compare.runs import run_reader
from syncbn.training.errors import SettingError
from syncbn.training.loggers import wandb_files
from syncbn.training.run_directory import record
from syncbn.training.standard_streams import accept_any_text
from tests.training.support.settled_config import settled
from tests.training.support.train_command import REPO, environment

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def called(where: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    env = {name: value for name, value in environment().items() if name != "LANG"} | ASCII
    return subprocess.run([sys.executable, *command], cwd=where, env=env, capture_output=True, timeout=150, check=False)


def test_a_sweep_and_its_comparison_in_a_directory_with_accents(tmp_path: Path) -> None:
    where = tmp_path / "dir é"
    where.mkdir()
    settings = ("model=mlp", "debug=fast", "logger=csv", "seed=0,1", "norm=sync,local", "trainer.devices=1")
    sweep = called(where, f"{REPO}/train.py", "-m", *settings, "hydra.sweep.dir='multirun/ü'")
    assert sweep.returncode == 0, sweep.stderr
    assert b"Traceback" not in sweep.stderr
    assert "multirun/ü/sweep.csv".encode() in sweep.stdout
    about = json.loads((where / "multirun/ü/0/run.json").read_text(encoding="utf-8"))
    assert os.fsencode(about["id"]).decode() == "ü-0"
    assert (where / "multirun/ü/0/checkpoints/best.ckpt").exists()
    compared = called(where, "-m", "syncbn.cli", "compare", "multirun/ü")
    assert compared.returncode == 0, compared.stderr
    assert b"\\u2014" in compared.stdout  # a dash, escaped
    page = (where / "multirun/ü/compare/report.html").read_text(encoding="utf-8")
    assert "multirun/ü" in page


def test_streams_take_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, TextIOWrapper(raw, encoding="ascii", write_through=True))
    accept_any_text()
    print("±1 → é \udcc3\udca9", file=sys.stderr)
    assert raw.getvalue() == b"\\xb11 \\u2192 \\xe9 \xc3\xa9\n"
    table = Table("±")
    table.add_row("→")
    Console(file=sys.stdout, width=20).print(table)
    assert b"\\u2192" in raw.getvalue()


def test_a_record_keeps_names_that_are_in_no_encoding(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    run_dir = tmp_path / name
    cfg = settled(f"run.id='{name}'")
    record.begin(replace(cfg, run_dir=run_dir), name, [f"run.id='{name}'"])
    record.end(run_dir, "finished")
    (found,) = run_reader.read([run_dir])
    assert (found.config["run"]["id"], found.about["id"]) == (name, name)
    with pytest.raises(
        SettingError, match=r"^logger=wandb: W&B takes UTF-8 only, .* use PYTHONUTF8=1, another name, or"
    ):
        wandb_files.check_names(run_dir)
    wandb_files.check_names(tmp_path / "café")
