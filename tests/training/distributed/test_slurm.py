"""Under Slurm, without one: what srun tells a task, and a scontrol that writes down what it is asked.

On a real Slurm: tests/slurm.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from syncbn.training.distributed import environment, slurm
from syncbn.training.run_directory import paths
from tests.support.refuses import refuses
from tests.support.warm_process import REPO, WarmProcess
from tests.training.launch.test_train import free_port
from tests.training.support.faulty_runs import fault
from tests.training.support.train_command import environment as variables

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "syncbn", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
JOB |= {"ENVIRONMENT": "BATCH"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
STEP |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def nothing_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    paths.new_id.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, None),
        (JOB, None),
        (JOB | STEP, "srun"),
        (JOB | STEP | {"TORCHELASTIC_RUN_ID": "a"}, "torchrun"),
        (JOB | STEP | {"SLURM_PTY_PORT": "1"}, None),  # a shell by srun --pty
        (JOB | {"SLURM_STEP_ID": "4294967290"}, None),  # a shell by salloc
    ],
)
def test_who_started_this_process(monkeypatch: pytest.MonkeyPatch, variables: dict, launcher: str | None) -> None:
    put(monkeypatch, variables)
    assert environment.launcher() == launcher


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (JOB, "slurm-7"),
        (JOB | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "slurm-5_2"),
        (JOB | {"SLURM_JOB_NAME": "interactive", "ENVIRONMENT": ""}, None),
    ],
)
def test_a_run_is_called_by_its_job(monkeypatch: pytest.MonkeyPatch, variables: dict, name: str | None) -> None:
    put(monkeypatch, variables)
    assert paths.new_id().startswith("slurm-") == (name is not None)
    assert name in (None, paths.new_id())


@pytest.mark.parametrize(
    "variables",
    [
        {},
        JOB | STEP,
        JOB | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"},
        JOB | {"SLURM_JOB_NAME": "bash", "ENVIRONMENT": ""},
    ],
)
def test_a_job_asked_for_rightly_is_let_through(monkeypatch: pytest.MonkeyPatch, variables: dict) -> None:
    put(monkeypatch, variables)
    slurm.check()


@pytest.mark.parametrize(
    ("variables", "refusal"),
    [
        (JOB, ("Slurm", None, "this job has 2 nodes and 2 tasks, but python was not started by srun")),
        (
            JOB | {"SLURM_JOB_NUM_NODES": "1"},
            ("Slurm", None, "this job has 1 node and 2 tasks, but python was not started by srun"),
        ),
        (JOB | STEP | {"SLURM_JOB_NAME": "bash"}, ("#SBATCH --job-name", "bash", "#SBATCH --job-name=syncbn")),
    ],
)
def test_a_job_asked_for_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict, refusal: tuple[str, str | None, str]
) -> None:
    put(monkeypatch, variables)
    with refuses(*refusal):
        slurm.check()


def test_unequal_nodes_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, JOB | STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"})
    with refuses("Slurm", None, "nodes have 2, 2, 1 tasks", "#SBATCH --nodes=3 and #SBATCH --ntasks-per-node=2"):
        slurm.join.__wrapped__()


def scontrol(where: Path, says: str, code: int = 0) -> Path:
    """A scontrol that says this of the job, and writes down every call."""
    program = where / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {where}/calls\necho '{says}'\nexit {code}\n", encoding="utf-8")
    program.chmod(0o755)
    return program.parent


@pytest.mark.parametrize(
    ("says", "signum", "requeued"),
    [
        ("JobState=RUNNING PreemptTime=None", signal.SIGUSR1, True),
        ("JobState=RUNNING PreemptTime=None", signal.SIGTERM, False),
        ("JobState=RUNNING PreemptTime=2026-01-31T23:59:59", signal.SIGTERM, True),
        ("JobState=RUNNING", signal.SIGTERM, False),
        ("JobState=CANCELLED PreemptTime=None", signal.SIGUSR1, False),
        ("JobState=CANCELLED PreemptTime=2026-01-31T23:59:59", signal.SIGTERM, False),
    ],
)
def test_which_jobs_are_requeued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, signum: int, requeued: bool
) -> None:
    put(monkeypatch, JOB | {"PATH": f"{scontrol(tmp_path, says)}:{os.environ['PATH']}"})
    assert slurm.should_requeue(signum) == requeued


def tasks(where: Path, *settings: str, popen: type[subprocess.Popen] = WarmProcess) -> list[subprocess.Popen]:
    """Two tasks as srun starts them, with USR1 blocked, on two nodes, of which this machine is both."""
    env = variables() | JOB | STEP | {"MASTER_PORT": str(free_port())}
    env["PATH"] = f"{where / 'bin'}:{env['PATH']}"
    command = [sys.executable, str(REPO / "train.py"), "model=mlp", "cluster=slurm", *settings]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        return [
            popen(
                command,
                cwd=where,
                env=env | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "SLURMD_NODENAME": f"node{node}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
            )
            for node in range(2)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_at_the_very_begin_stops_both_tasks_and_puts_the_job_back(tmp_path: Path) -> None:
    scontrol(tmp_path, "JobState=RUNNING PreemptTime=None")
    both = tasks(tmp_path, "trainer.max_epochs=2", "norm.group=node", popen=subprocess.Popen)
    time.sleep(0.3)  # Python has begun, and train.py does not listen yet
    both[1].send_signal(signal.SIGUSR1)
    out = [task.communicate(timeout=120)[0] for task in both]
    assert [task.returncode for task in both] == [128 + signal.SIGUSR1] * 2, out
    assert "stopped by SIGUSR1: job 7 is requeued and will resume from its last checkpoint\n" in out[0]
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == ["show job --oneliner 7", "requeue 7"]
    (run_dir,) = tmp_path.glob("outputs/*")
    assert run_dir.name == "slurm-7"
    about = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    assert (about["status"], about["world_size"], about["normalization_batch"]) == ("interrupted", 2, 32)


def test_a_job_that_slurm_has_put_back_itself_is_not_told_to_be_sent_again(tmp_path: Path) -> None:
    """After ``scontrol requeue``: a SIGTERM, and Slurm counts one more restart than this process is of."""
    scontrol(tmp_path, "JobState=COMPLETING PreemptTime=None Restarts=1")
    both = tasks(tmp_path, "trainer.max_epochs=300", "logger=csv")
    deadline = time.monotonic() + 60
    while not (tmp_path / "outputs/slurm-7/run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for task in both:
        task.send_signal(signal.SIGTERM)
    out = [task.communicate(timeout=120)[0] for task in both]
    assert [task.returncode for task in both] == [128 + signal.SIGTERM] * 2, out
    assert "stopped by SIGTERM: job 7 is requeued and will resume from its last checkpoint\n" in out[0]
    assert "error: " not in out[0]
    assert "requeue" not in (tmp_path / "calls").read_text(encoding="utf-8")
    about = json.loads((tmp_path / "outputs/slurm-7/run.json").read_text(encoding="utf-8"))
    assert (about["status"], about["requeued"]) == ("interrupted", "7")


def test_where_slurm_says_no_the_line_says_so(tmp_path: Path) -> None:
    scontrol(tmp_path, "JobState=RUNNING PreemptTime=None", code=1)
    both = tasks(tmp_path, "trainer.max_epochs=2", "logger=csv")
    time.sleep(0.3)
    for task in both:
        task.send_signal(signal.SIGUSR1)
    out = [task.communicate(timeout=120)[0] for task in both]
    assert [task.returncode for task in both] == [128 + signal.SIGUSR1] * 2, out
    assert "error: scontrol show job --oneliner 7: " in out[0]
    assert "error: stopped by SIGUSR1; resume with: sbatch slurm/train.sbatch model=mlp " in out[0]


def test_a_mistake_is_printed_though_another_task_finds_it_first_and_srun_then_stops_them_all(tmp_path: Path) -> None:
    """``srun --kill-on-bad-exit`` stops all tasks when the first has failed: that must not be before rank 0 prints."""
    tasks_0 = tasks(tmp_path, "trainer.num_nodes=3")
    tasks_1 = tasks(tmp_path, "trainer.num_nodes=3")
    line = "trainer.num_nodes=3: srun started 2; leave it out, or ask for #SBATCH --nodes=3 and #SBATCH "
    line += "--ntasks-per-node=1\n"
    for first in (tasks_0[0], tasks_1[0]):
        assert first.communicate(timeout=60)[0] == f"error: {line}"
        assert first.returncode == 1
    time.sleep(2)
    assert tasks_0[1].poll() is None
    tasks_0[1].send_signal(signal.SIGTERM)
    assert tasks_0[1].communicate(timeout=5)[0] == ""
    assert tasks_1[1].communicate(timeout=60)[0] == f"error: rank 1: {line}", "nobody stopped it"
    assert [tasks_0[1].returncode, tasks_1[1].returncode] == [1, 1]


def test_scontrol_answers_though_slurm_stops_all_processes_of_the_job(tmp_path: Path) -> None:
    scontrol(tmp_path, "node4")
    program = tmp_path / "bin" / "scontrol"
    program.write_text(program.read_text(encoding="utf-8").replace("echo '", "kill -TERM $$\necho '"), encoding="utf-8")
    code = "from syncbn.training.distributed import slurm; slurm.join(); import os; print(os.environ['MASTER_ADDR'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables()
        | JOB
        | STEP
        | {"SLURM_STEP_NODELIST": "node[4-5]", "SLURM_PROCID": "1", "SLURM_NODEID": "1"}
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        encoding="utf-8",
    )
    assert done.stdout == "node4\n", done.stderr


def test_a_task_that_hangs_is_named_by_the_other(tmp_path: Path) -> None:
    both = tasks(tmp_path, "timeouts.collective=5", "logger=csv", fault(tmp_path, "hang", epoch=1, rank=1))
    try:
        out = both[0].communicate(timeout=90)[0]
    finally:
        both[1].kill()
        both[1].communicate()
    assert both[0].returncode != 0
    cause = "no response from rank 1 on node1 within 5 s, timeouts.collective (RuntimeError: "
    assert f"error: rank 0 of 2 on node0 failed: {cause}" in out


def test_what_has_finished_is_not_killed_by_word_that_its_time_is_nearly_up() -> None:
    """Python ends with signals as they were by default; a program that takes its place begins with them so too."""
    code = "import os; from syncbn.training.distributed import signals; signals.listen(); signals.done(); "
    code += "os.execvp('sh', ['sh', '-c', 'kill -USR1 $$; kill -USR2 $$; echo alive'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, encoding="utf-8"
    )
    assert done.stdout == "alive\n", done.stderr
