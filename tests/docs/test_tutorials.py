"""The tutorials run as they are written, with fewer seeds and batches, and print lines of the shape that they show."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from typer.testing import CliRunner

from syncbn.cli import app
from syncbn.training.launch import main  # noqa: F401  # registers the types and names that conf/ uses
from tests.support.tutorial_pages import Command, File, shape, steps
from tests.support.warm_process import REPO
from tests.training.support import train_command
from tests.training.support.train_command import Run

PAGES = sorted((REPO / "docs/tutorials").glob("*.md"))
FAST = ("debug=fast", "plots=false")  # four batches an epoch; it comes before the settings of the page, which win
SIGNALS = {"TERM": (signal.SIGTERM, 143), "KILL": (signal.SIGKILL, -9)}


def cheap(word: str) -> str:
    """A word of a command with two seeds at most, and two devices."""
    word = re.sub(r"^(seed=\d+,\d+),[\d,]+$", r"\1", word)
    return re.sub(r"^trainer.devices=\d+$", "trainer.devices=2", word)


class Reader:
    """A reader of a tutorial, in a directory that was empty."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def follow(self, step: File | Command) -> str:
        """Writes the file, or types the command; what it has printed."""
        if isinstance(step, File):
            file = self.where / step.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(step.text, encoding="utf-8")
            return ""
        program, *words = step.words
        if program == "cd":
            self.where = self.where / words[0]
            return ""
        if program == "timeout":
            return self.stop_early(SIGNALS[words[1]], words[3:])
        if program == "head":
            return subprocess.run(step.words, cwd=self.where, capture_output=True, text=True, check=True).stdout
        if (program, words[0]) == ("syncbn", "compare"):
            return self.compare(words)
        return self.run(step.words).ended().out

    def run(self, words: list[str], meanwhile: Callable[[int], None] | None = None) -> Run:
        program, *words = words
        command = [sys.executable, *(["-m", "syncbn"] if program == "syncbn" else [])]
        if words[0] == "train":
            words = ["train", *(word for word in words[1:] if "=" not in word), *FAST, *words_of_settings(words)]
        environment = train_command.environment() | {"PYTHONPATH": str(REPO)}
        return train_command.run(self.where, *command, *words, env=environment, timeout=120, meanwhile=meanwhile)

    def stop_early(self, how: tuple[signal.Signals, int], words: list[str]) -> str:
        name = next(word.partition("=")[2] for word in words if word.startswith("run.id="))

        def stop(leader: int) -> None:
            while not (self.where / "outputs" / name / "checkpoints/last.ckpt").exists():
                time.sleep(0.01)
            os.kill(leader, how[0])

        run = self.run(words, stop)
        assert run.code == how[1], run.err
        return run.out + run.err

    def compare(self, words: list[str]) -> str:
        """In this process: pandas and what else it needs are imported once."""
        before = Path.cwd()
        os.chdir(self.where)
        try:
            result = CliRunner().invoke(app, [*words, "--no-report"])
        finally:
            os.chdir(before)
        assert result.exit_code == 0, result.output
        return result.output


def words_of_settings(words: list[str]) -> list[str]:
    """The settings of a command, shortened."""
    return [cheap(word) for word in words[1:] if "=" in word]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    reader, commands = Reader(tmp_path), 0
    for step in steps(page):
        printed = reader.follow(step)
        if isinstance(step, Command):
            commands += 1
            shapes = {shape(line) for line in printed.splitlines()}
            assert [line for line in step.printed if shape(line) not in shapes] == [], printed
    assert commands >= 3


def unrun(page: Path) -> list[str]:
    """The settings of the commands for training in those blocks of a page that no test runs."""
    text = re.sub(r"^```console.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return settings_in(text)


def settings_in(text: str) -> list[str]:
    text = text.replace("\\\n", " ")
    found = re.findall(r"^ *(?:[$!] *)?(?:\w+=\w+ )?syncbn train (.*=.*)$", text, re.MULTILINE)
    found += re.findall(r'make train ARGS="(.*?)"', text) + re.findall(r"slurm/train.sbatch (.*)$", text, re.MULTILINE)
    return [each for each in found if "--config-dir" not in each]


SETTINGS = [(page.stem, each) for page in PAGES for each in unrun(page)]
SETTINGS += [
    (name, each)
    for name in ("quickstart", "notebooks/comparing_runs")
    for each in settings_in((REPO / f"docs/{name}.md").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "settings"), SETTINGS)
def test_a_setting_on_the_page_exists(page: str, settings: str) -> None:
    first = [re.sub(r"=([^,\[]+),.*$", r"=\1", word) for word in shlex.split(settings) if "=" in word]
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        compose("config", first)


def test_each_kind_of_block_is_found() -> None:
    assert {page for page, _ in SETTINGS} >= {"own_images", "preemption", "quickstart", "notebooks/comparing_runs"}
