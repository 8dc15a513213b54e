"""A reader of a tutorial: writes its files and types its commands, in a directory that was empty."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from syncbn.cli import app
from tests.support.tutorial_pages import Command, File, shape, steps
from tests.support.warm_process import REPO
from tests.training.support import train_command
from tests.training.support.train_command import Run

FAST = ("debug=fast", "plots=false")  # four batches an epoch; it comes before the settings of the page, which win
CODES = {signal.SIGTERM: 143, signal.SIGKILL: -9}


class Reader:
    """Follows a page.

    Args:
        page: the page.
        where: an empty directory.
        shortened: train with few batches, and two seeds and two devices at most, in forks of a process that has
            imported everything. Otherwise each command is typed unchanged, in an interpreter of its own.
    """

    def __init__(self, page: Path, where: Path, shortened: bool) -> None:
        self.steps, self.where, self.shortened = steps(page), where, shortened

    def follow(self, step: File | Command) -> list[str]:
        """Writes a file, or types a command.

        Returns:
            The lines that the page shows and the command has not printed, by their shape.

        Raises:
            AssertionError: the command has failed.
        """
        if isinstance(step, File):
            file = self.where / step.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(step.text, encoding="utf-8")
            return []
        printed = {shape(line) for line in self._type(step.words).splitlines()}
        return [line for line in step.printed if shape(line) not in printed]

    def _type(self, words: list[str]) -> str:
        """What a command prints."""
        if words[0] == "cd":
            self.where = self.where / words[1]
            return ""
        if words[0] == "head":
            return subprocess.run(words, cwd=self.where, capture_output=True, encoding="utf-8", check=True).stdout
        if self.shortened and words[:2] == ["python", "stop.py"]:
            return self._stop_early(words[2], signal.Signals[words[3]])
        if self.shortened and words[:2] == ["syncbn", "compare"]:
            return self._compare(words[1:])
        run = self._run(words).ended()
        return run.out + run.err

    def _run(self, words: list[str], meanwhile: Callable[[int], None] | None = None) -> Run:
        command, words = [sys.executable, *(["-m", "syncbn"] if words[0] == "syncbn" else [])], words[1:]
        if self.shortened and words[0] == "train":
            options, settings = ([word for word in words[1:] if ("=" in word) is wanted] for wanted in (False, True))
            words = ["train", *options, *FAST, *map(_cheap, settings)]
        if self.shortened and words[:2] == ["-m", "pytest"]:
            words = [*words, "-p", "no:warnings"]  # those of plugins that the forked process has imported already
        path = (
            [str(REPO)] if command[1:] or not self.shortened else [str(self.where), str(REPO)]
        )  # as python SCRIPT has
        environment = train_command.environment() | {"PYTHONPATH": os.pathsep.join(path)}
        options_of_run = {"env": environment, "timeout": 120 if self.shortened else 1200, "fresh": not self.shortened}
        return train_command.run(self.where, *command, *words, meanwhile=meanwhile, **options_of_run)

    def _stop_early(self, name: str, how: signal.Signals) -> str:
        """What ``stop.py`` does, in a fork; the settings are those of the command that resumes the run."""
        commands = (step.words for step in self.steps if isinstance(step, Command))
        words = next(each for each in commands if f"run.id={name}" in each)

        def stop(leader: int) -> None:
            while not (self.where / "outputs" / name / "checkpoints/last.ckpt").exists():
                time.sleep(0.01)
            os.kill(leader, how)

        run = self._run(words, stop)
        assert run.code == CODES[how], run.err
        return f"{run.out}{run.err}exit status {run.code}"

    def _compare(self, words: list[str]) -> str:
        """In this process, where pandas and what else it needs are imported once."""
        before = Path.cwd()
        os.chdir(self.where)
        try:
            result = CliRunner().invoke(app, [*words, "--no-report"])
        finally:
            os.chdir(before)
        assert result.exit_code == 0, result.output
        return result.output


def _cheap(word: str) -> str:
    """A setting, with two seeds at most, and two devices."""
    word = re.sub(r"^(seed=\d+,\d+),[\d,]+$", r"\1", word)  # the jobs of a wider sweep have all finished then
    return re.sub(r"^trainer.devices=\d\d*$", "trainer.devices=2", word) if word != "trainer.devices=1" else word
