"""The command ``syncbn``: quick where nothing is computed, and plain."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from syncbn import __main__ as program
from tests.test_import import HEAVY, modules_after


def syncbn(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")}
    command = [sys.executable, "-m", "syncbn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env, encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["compare", "--help"]])
def test_help_is_plain(arguments: list[str]) -> None:
    done = syncbn(*arguments)
    assert done.returncode == 0
    assert (arguments[0] if arguments[1:] else "doctor") in done.stdout
    assert not {*"\x1b╭│"} & {*done.stdout}


def test_the_command_waits_for_nothing_heavy() -> None:
    loaded = modules_after("import syncbn.__main__, syncbn.cli")
    assert not loaded & {*HEAVY} - {"rich"}


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["docter"], "No such command 'docter'"),
        (["doctor", "--timeout", "soon"], "Invalid value for '--timeout'"),
        (["doctor", "--timeout", "0"], "Invalid value for '--timeout'"),
    ],
)
def test_a_mistake_is_told_plainly(arguments: list[str], last: str) -> None:
    done = syncbn(*arguments)
    assert done.returncode == 2
    assert last in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_signal_while_it_starts_is_one_line() -> None:
    code = "import signal, sys\nclass Finder:\n    def find_spec(self, name, *_):\n"
    code += "        name == 'typer' and signal.raise_signal(signal.SIGINT)\nsys.meta_path.insert(0, Finder())\n"
    code += "sys.argv = ['syncbn', 'doctor']; from syncbn import __main__; __main__.main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "syncbn.cli", "compare", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8", check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_calls_it() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert EntryPoint("syncbn", project["scripts"]["syncbn"], "console_scripts").load() is program.main
