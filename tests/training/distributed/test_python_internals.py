"""The private parts of Python's library are there, and mean what they did in CPython 3.11."""

import multiprocessing
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, process, util
from pathlib import Path
from typing import Any

import pytest

from syncbn.training.distributed import python_internals
from tests.support.private_names import private_names

OWNERS: dict[str, Any] = {
    "_forkserver": forkserver,
    "_forkserver_pid": forkserver._forkserver,
    "_config": process.current_process(),
    "_execute_child": subprocess.Popen,
}


@pytest.mark.parametrize("name", OWNERS)
def test_python_has_the_attribute(name: str) -> None:
    assert hasattr(OWNERS[name], name), name


def test_every_private_name_in_the_module_has_an_owner() -> None:
    assert private_names(Path(python_internals.__file__)) | {"_execute_child"} == OWNERS.keys()


def test_multiprocessing_and_its_children_use_the_directory_that_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.current_process(), "_config", dict(process.current_process()._config))
    python_internals.set_temporary_directory(str(tmp_path))
    assert python_internals.temporary_directory() == util.get_temp_dir() == str(tmp_path)
    child = multiprocessing.get_context("spawn").Process()
    assert child._config["tempdir"] == str(tmp_path)
    monkeypatch.setattr(process.current_process(), "_config", {})
    assert python_internals.temporary_directory() is None


def test_a_program_starts_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        events.append("before")
        yield
        events.append("after")

    monkeypatch.setattr(subprocess.Popen, "_execute_child", subprocess.Popen._execute_child)
    for _ in range(2):  # a second call replaces the first
        python_internals.start_programs_within(context)
    assert subprocess.run(["echo", "here"], capture_output=True, check=True).stdout == b"here\n"
    assert events == ["before", "after"]


def test_without_a_fork_server_there_is_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "_forkserver", forkserver.ForkServer())
    assert python_internals.fork_server_pid() is None
