"""What a launcher keeps in the temporary directory ends with it, or is removed by the next."""

import os
import subprocess
import sys
from multiprocessing import connection, process
from pathlib import Path

import pytest

from syncbn.training.processes import temporary_directory

MAKE = """import sys
from syncbn.training.processes import temporary_directory
temporary_directory.LONGEST_PARENT = 999
print(temporary_directory.make(), flush=True)"""


def test_the_next_start_removes_what_the_dead_have_left_and_nothing_else(tmp_path: Path) -> None:
    command, env = [sys.executable, "-c", f"{MAKE}\nsys.stdin.read()"], {"TMPDIR": str(tmp_path)}
    options = {"env": env, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    lives, dies = (subprocess.Popen(command, **options) for _ in range(2))  # type: ignore[call-overload]
    places = [Path(each.stdout.readline().strip()) for each in (lives, dies)]
    (places[1] / "socket").touch()
    (tmp_path / "syncbn-runs").mkdir()
    dies.kill()
    dies.communicate()
    assert places[1].exists()
    subprocess.run([sys.executable, "-c", MAKE], env=env, check=True, capture_output=True, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {places[0].name, "syncbn-runs"}
    lives.communicate()
    assert not places[0].exists()


def test_multiprocessing_takes_it_for_its_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private attribute still means what it did."""
    monkeypatch.setattr(process.current_process(), "_config", {"tempdir": f"{tmp_path}/syncbn-run-a"})
    assert temporary_directory.inherited() == tmp_path / "syncbn-run-a"
    (tmp_path / "syncbn-run-a").mkdir()
    assert Path(connection.arbitrary_address("AF_UNIX")).parent == tmp_path / "syncbn-run-a"
    temporary_directory.remove()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(process.current_process(), "_config", {"tempdir": f"{tmp_path}/pymp-a"})
    assert temporary_directory.inherited() is None


def test_a_socket_never_gets_too_long_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for long in ("/tmp/" + "long" * 20, "/tmp/" + "é" * 40):  # of the second 45 characters are 85 bytes
        monkeypatch.setattr(temporary_directory.tempfile, "gettempdir", lambda long=long: long)
        assert len(os.fsencode(temporary_directory._parent() / "syncbn-run-12345678" / "listener-12345678")) < 108
