"""A process that the warm server forks is as one that an interpreter begins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigLoadError

from tests.support import read_once
from tests.support.warm_process import NAMESPACES, WarmProcess, can_serve
from tests.training.support.own_mount import own_mount
from tests.training.support.train_command import environment, run

PROGRAM = """
import os, signal, sys
print(sys.argv[1:], os.environ["A"], os.getcwd(), os.getsid(0) == os.getpid(), sys.version_info[:2], flush=True)
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), sys.stdin.read(), file=sys.stderr)
{end}
"""
ENDS = {
    "": 0,
    "sys.exit(3)": 3,
    "sys.exit('why')": 1,
    "raise ValueError": 1,
    "os.kill(os.getpid(), signal.SIGKILL)": -9,
    "os.abort()": -6,
}


@pytest.mark.parametrize(("end", "code"), ENDS.items())
@pytest.mark.parametrize("popen", [subprocess.Popen, WarmProcess])
def test_they_are_given_and_answer_the_same(tmp_path: Path, popen: type[subprocess.Popen], end: str, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(end=end), encoding="utf-8")
    environment = os.environ | {"A": "b c", "PYTHONPATH": os.pathsep.join(["own", os.environ.get("PYTHONPATH", "")])}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        process = popen(
            [sys.executable, "-u", str(program), "-m", "x=1 2"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            encoding="utf-8",
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    out, err = process.communicate("typed", timeout=60)
    assert process.returncode == process.poll() == code
    assert out == f"['-m', 'x=1 2'] b c {tmp_path} True {sys.version_info[:2]}\n"
    first, *rest = err.splitlines()
    assert first == "[<Signals.SIGUSR1: 10>] typed"
    assert (rest[-1] if rest else "") == {"sys.exit('why')": "why", "raise ValueError": "ValueError"}.get(end, "")


def test_signals_that_are_ignored_here_are_ignored_there(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    text = "import signal; print([signal.getsignal(each) is signal.SIG_IGN for each in (signal.SIGINT, signal.SIGHUP)])"
    program.write_text(text, encoding="utf-8")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = [
            popen([sys.executable, str(program)], stdout=subprocess.PIPE, encoding="utf-8").communicate(timeout=60)[0]
            for popen in (subprocess.Popen, WarmProcess)
        ]
    finally:
        signal.signal(signal.SIGINT, before)
    assert found[0] == found[1]
    assert found[0].startswith("[True, ")


def test_it_can_be_within_a_mount_of_a_tests_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os; print(os.getuid()); open('mount/new', 'w').close()", encoding="utf-8")
    with own_mount(tmp_path / "mount") as mount:
        env = environment() | {NAMESPACES: str(mount.process)}
        ended = run(tmp_path, sys.executable, str(program), env=env, timeout=60).ended()
        assert [path.name for path in mount.seen.iterdir()] == ["new"]
    assert ended.out == "0\n"
    assert not list((tmp_path / "mount").iterdir())


def test_a_process_is_waited_for_and_killed() -> None:
    process = WarmProcess([sys.executable, "-m", "timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    assert process.poll() is None
    process.kill()
    assert process.wait(20) == process.returncode == -signal.SIGKILL
    begin = time.monotonic()
    while Path(f"/proc/{process.pid}").exists() and time.monotonic() - begin < 20:
        time.sleep(0.02)
    assert not Path(f"/proc/{process.pid}").exists()


def test_what_is_read_at_the_start_of_an_interpreter_needs_one() -> None:
    ours = dict(os.environ)
    assert can_serve(ours)
    assert can_serve(ours | {"WANDB_MODE": "offline", "PYTHONPATH": "elsewhere"})
    for name in ("PYTHONUTF8", "OMP_NUM_THREADS", "TORCH_LOGS", "SYNCBN_KERNELS"):
        assert not can_serve(ours | {name: "another value"})


def test_settings_are_read_again_where_their_file_has_changed(tmp_path: Path) -> None:
    source, file = FileConfigSource("main", str(tmp_path)), tmp_path / "config.yaml"
    for number in (1, 2):
        file.write_text(f"a: {number}", encoding="utf-8")
        os.utime(file, (number, number))
        for _ in range(2):
            config = read_once.load_config(source, "config").config
            assert config.a == number
            config.a = 3  # as Hydra changes it
    file.unlink()
    with pytest.raises(ConfigLoadError):
        read_once.load_config(source, "config")
