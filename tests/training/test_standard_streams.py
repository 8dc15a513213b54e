"""Output whose reader is gone is dropped; whoever prints does not notice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = "from syncbn.training import standard_streams as streams; streams.outlive_reader(); streams.outlive_reader()"
PRINTS = """
import logging, os, pathlib, sys, warnings
from rich.console import Console
from tqdm import tqdm
for number in range(3):
    print("line", flush=True)
    print("error", file=sys.stderr)
    Console().print("table")
    warnings.warn("a warning")
    logging.getLogger().error("log")
    list(tqdm(range(3)))
    os.system("echo child")
pathlib.Path("done").touch()
sys.exit(7)
"""


def call(where: Path, code: str, *options: str, begin: str = BEGIN, **files: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", f"{begin}\n{code}"]
    return subprocess.run(command, cwd=where, encoding="utf-8", timeout=60, **files)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_pipe_without_a_reader_ends_nothing(tmp_path: Path, options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = call(tmp_path, PRINTS, *options, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 7
    assert (tmp_path / "done").exists()


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        assert call(tmp_path, PRINTS, stdout=full.fileno(), stderr=full.fileno()).returncode == 7


def test_a_stream_that_is_closed_does_not_give_its_number_away(tmp_path: Path) -> None:
    code = (
        f"{BEGIN}; file = open('file', 'w'); print('lost', flush=True); import sys; sys.exit(7 + sys.stdout.isatty())"
    )
    closed = ["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(closed, cwd=tmp_path, timeout=60, check=False).returncode == 7
    assert (tmp_path / "file").read_text(encoding="utf-8") == ""


def test_what_is_read_is_as_without_it(tmp_path: Path) -> None:
    code = "import sys; print('ä'); print('error', file=sys.stderr); print(sys.stdout.name, sys.stdout.encoding)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before, now = (call(tmp_path, code, begin=begin, **pipes) for begin in ("", BEGIN))
    assert (now.stdout, now.stderr) == (before.stdout, before.stderr)
    assert now.stdout.startswith("ä\n<stdout> ")
