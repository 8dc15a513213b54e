"""Things that go wrong: each comes to a clear end in a bounded time, leaves no process, and loses nothing saved."""

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from syncbn.training.loggers import wandb_files, wandb_internals
from tests.training.support import wandb_log
from tests.training.support.faulty_runs import fault, faulty, stopped
from tests.training.support.own_mount import own_mount
from tests.training.support.train_command import PROJECT, Run, environment, train
from tests.training.support.train_command import run as start

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def check(run: Run, *, code: int = 1, status: str = "failed", first: str = "error: ", points: bool = True) -> str:
    """What holds after every fault; the error line."""
    assert run.code == code, run.err
    assert run.left == []
    assert run.json("run")["status"] == status
    lines = run.err.splitlines()
    assert lines[-1].startswith(first), run.err
    written = (run.directory / "train.log").read_text(encoding="utf-8").splitlines()  # type: ignore[operator]
    assert lines == [line for line in written if line in lines]
    for path in (run.directory / "checkpoints").glob("*.ckpt"):  # type: ignore[operator]
        torch.load(path, weights_only=True)
    if points:
        assert f"resume with: python {Path(__file__).parents[3]}/train.py --config-dir " in lines[-1]
        assert f"run.id={run.directory.name}" in lines[-1]  # type: ignore[union-attr]
    return lines[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(tmp_path: Path, rank: int) -> None:
    run = faulty(tmp_path, "run.id=a", fault(tmp_path, "kill", epoch=1, batch=3, rank=rank), logger="wandb")
    check(run, first=f"error: rank {rank} of 2 (pid ")
    assert " was killed by SIGKILL, perhaps for lack of memory (see dmesg); resume with: " in run.err
    assert run.err.count("\n") == 1
    (wandb,) = {path.resolve() for path in (run.directory / "wandb").glob("offline-run-*")} if rank else [None]
    if wandb is not None:
        assert wandb_log.summary(wandb)["exit_code"] == 1
    again = faulty(tmp_path, "run.id=a", fault(tmp_path, "kill", epoch=1, batch=3, rank=rank), logger="wandb").ended()
    attempts = wandb_files.directories(again.directory)
    assert len(attempts) == (2 if rank else 3)  # the launcher marks the run of a dead rank 0 as failed
    lines = [line for attempt in attempts for line in wandb_internals.history(attempt)]
    points = [(line["trainer/global_step"], name) for line in lines for name in line if name.startswith("train/")]
    assert len(points) == len(set(points))  # no step twice
    assert {step for step, name in points if name == "train/loss_step"} == set(range(3 * 18))  # and none lost
    upload = again.out.splitlines()[-1]
    assert upload.startswith("upload it: ")
    assert all(str(d.relative_to(tmp_path)) in upload for d in attempts if wandb_internals.history(d))


def test_an_exception_in_the_middle_of_one_ranks_forward_pass(tmp_path: Path) -> None:
    run = faulty(tmp_path, "+model.breaks=true", "run.id=a", logger="wandb")
    line = check(run, first="error: rank 1 of 2 (pid ")
    assert " failed: ValueError: a layer of the user's (" in line
    assert "faults.py:" in line
    assert run.err.count("\n") == 1
    trace = (run.directory / "error.txt").read_text(encoding="utf-8")  # type: ignore[operator]
    assert "faults.py" in trace
    (wandb,) = {path.resolve() for path in (run.directory / "wandb").glob("offline-run-*")}  # type: ignore[operator]
    assert wandb_log.summary(wandb)["state"] == "failed"


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    begin = time.monotonic()
    run = faulty(tmp_path, "run.id=a", "timeouts.collective=5", fault(tmp_path, "hang", epoch=1, rank=1))
    line = check(run, first="error: rank 1 of 2 (pid ")
    assert " is stopped, by SIGSTOP or a debugger, and the other ranks timed out waiting for it; " in line
    assert time.monotonic() - begin < 60


def test_a_rank_that_is_busy_for_ever_is_named_with_its_stacks(tmp_path: Path) -> None:
    run = faulty(tmp_path, "run.id=a", "timeouts.collective=5", fault(tmp_path, "sleep", epoch=1, rank=0))
    line = check(run, first="error: rank 0 of 2 (pid ")
    assert " is busy or waiting (its stacks: " in line
    stacks = Path(line.split("its stacks: ")[1].split(")")[0])
    assert "faults.py" in (tmp_path / stacks).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "code", "name"),
    [("terminate", 143, "SIGTERM"), ("interrupt", 130, "SIGINT"), ("control_c", 130, "SIGINT")],
)
def test_a_signal_stops_all_ranks_after_the_step(tmp_path: Path, what: str, code: int, name: str) -> None:
    at = {"hook": "on_train_batch_start", "epoch": 1, "batch": 4, "rank": 1}
    run = faulty(tmp_path, "run.id=a", "data.num_workers=1", fault(tmp_path, what, **at), logger="wandb")
    check(run, code=code, status="interrupted", first=f"error: stopped by {name}; ")
    assert f"{name}: the run stops after this step and saves a checkpoint" in run.err
    checkpoint = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[operator]
    assert checkpoint["global_step"] == 18 + 5
    (wandb,) = {path.resolve() for path in (run.directory / "wandb").glob("offline-run-*")}  # type: ignore[operator]
    assert wandb_log.summary(wandb)["exit_code"] == 1  # preempted, says wandb where a server is there to show it


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    """W&B's run is left as it is: to open it once more would take seconds."""
    begin = time.monotonic()
    run = faulty(tmp_path, "run.id=a", fault(tmp_path, "interrupt_twice", epoch=1), logger="wandb")
    check(run, code=130, status="interrupted", first="error: stopped by SIGINT, some ranks in the middle of a step; ")
    assert time.monotonic() - begin < 45
    assert len(wandb_files.directories(run.directory)) == 1


def test_output_that_nobody_reads_any_more_changes_nothing(tmp_path: Path) -> None:
    """``python train.py | head``: epochs end, with lines that go nowhere, until a signal stops it as ever."""
    lost = fault(tmp_path, "lose_reader", batch=1)
    at = "hook: on_train_batch_start, epoch: 1, batch: 4"
    stop = f"+callbacks.stop={{_target_: faults.Fault, what: control_c, once: stop, {at}}}"
    run = faulty(tmp_path, "run.id=a", lost, stop, gone=tmp_path / "once")
    assert (run.code, run.left) == (130, [])
    assert run.json("run")["status"] == "interrupted"
    assert torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 18 + 5


@pytest.mark.parametrize(  # make prove-faults tries each at each moment
    ("what", "moment"),
    [
        ("control_c", "the start"),
        ("terminate_group", "validation"),
        ("control_c", "a save"),
        ("hang_up", "a step"),
        ("lose_reader_and_control_c", "the start"),
    ],
)
def test_a_stop_of_the_whole_group_ends_well(tmp_path: Path, what: str, moment: str) -> None:
    run, wrong = stopped(tmp_path, what, moment, delay=0.5)
    assert not wrong
    assert moment != "the start" or run.directory is None or what.startswith("lose_reader")


def test_a_signal_before_the_first_step_is_not_lost(tmp_path: Path) -> None:
    def hit(leader: int) -> None:
        while not (tmp_path / "outputs" / "a" / "run.json").exists():
            time.sleep(0.01)
        os.killpg(leader, signal.SIGHUP)

    run = faulty(tmp_path, "run.id=a", "trainer.max_epochs=300", meanwhile=hit)
    check(run, code=129, status="interrupted", first="error: stopped by SIGHUP; ", points=False)


def test_a_killed_fork_server_does_not_end_the_run(tmp_path: Path) -> None:
    run = faulty(tmp_path, "run.id=a", fault(tmp_path, "kill_server"), "trainer.max_epochs=1")
    assert (run.code, run.left) == (0, [])
    assert run.err == "warning: the fork server was killed; the ranks continue without it\n"
    assert run.json("run")["status"] == "finished"


def test_ranks_that_do_not_stop_are_killed_in_the_end(tmp_path: Path) -> None:
    run = faulty(tmp_path, "run.id=a", "timeouts.stop=3", fault(tmp_path, "terminate_and_sleep", epoch=1))
    check(run, code=143, status="interrupted", first="error: stopped by SIGTERM, some ranks in the middle of a step; ")


def test_a_signal_in_the_test_keeps_what_was_trained(tmp_path: Path) -> None:
    run = faulty(tmp_path, "run.id=a", fault(tmp_path, "terminate", hook="on_test_batch_end"), "trainer.max_epochs=1")
    check(run, code=143, status="interrupted", first="error: stopped by SIGTERM; ")
    again = faulty(tmp_path, "run.id=a", "trainer.max_epochs=1").ended()
    assert "epoch 1/1" not in again.out


def test_a_signal_while_ranks_start_is_not_lost(tmp_path: Path) -> None:
    """Also where the launcher itself was started with SIGINT ignored, as by a script in the background."""

    def hit(leader: int) -> None:
        while not (tmp_path / "outputs/a/ranks").exists():
            time.sleep(0.01)
        os.kill(leader, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the program then finds it
    try:
        run = faulty(tmp_path, "run.id=a", "trainer.max_epochs=300", meanwhile=hit)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.code == 130, run.err
    assert run.left == []
    assert "error: stopped by SIGINT" in run.err


def test_under_torchrun_an_exception_is_one_line_of_its_rank(tmp_path: Path) -> None:
    run = faulty(tmp_path, "+model.breaks=true", "run.id=a", launcher=TORCHRUN).ended(1)
    assert run.left == []
    (line,) = [line for line in run.err.splitlines() if line.startswith("error: rank 1 of 2 on ")]
    assert " failed: ValueError: a layer of the user's (" in line
    assert "resume with: torchrun ... " in line
    others = [line for line in run.err.splitlines() if line.startswith("error: rank 0 ")]  # torchrun may have ended it
    assert all(f" failed: rank 1 on {socket.gethostname()} failed: ValueError (" in line for line in others)
    trace = (run.directory / "ranks" / "1-error.txt").read_text(encoding="utf-8")  # type: ignore[operator]
    assert line in (run.directory / "train.log").read_text(encoding="utf-8").splitlines()  # type: ignore[operator]
    assert "a layer of the user's" in trace
    assert "Error executing job" not in run.err  # Hydra's


def test_under_torchrun_a_rank_that_hangs_is_named_by_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    hang = fault(tmp_path, "sleep_until_terminated", epoch=1, rank=1)
    three = [*TORCHRUN[:-1], "--nproc-per-node=3"]
    run = faulty(tmp_path, "run.id=a", "timeouts.collective=5", hang, launcher=three)
    assert run.code != 0
    assert run.left == []
    assert time.monotonic() - begin < 90
    lines = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert lines, run.err
    host = socket.gethostname()
    cause = f"no response from rank 1 on {host} within 5 s, timeouts.collective \\(RuntimeError: .*Timed out .*\\)"
    for line in lines:  # torchrun may end the second before it has said anything
        assert re.match(f"error: rank [02] of 3 on {host} failed: {cause}; resume with: torchrun", line), run.err


def test_under_torchrun_what_rank_0_refuses_is_one_line(tmp_path: Path) -> None:
    assert faulty(tmp_path, "run.id=a", "trainer.max_epochs=1").code == 0
    run = faulty(tmp_path, "run.id=a", "trainer.max_epochs=1", "seed=7", launcher=TORCHRUN).ended(1)
    assert run.left == []
    assert run.err.count("error: run.id=a: this run has finished with other settings") == 1


def test_under_torchrun_a_signal_stops_all_ranks_too(tmp_path: Path) -> None:
    stop = fault(tmp_path, "terminate", hook="on_train_batch_start", epoch=1, batch=4)
    run = faulty(tmp_path, "run.id=a", stop, launcher=TORCHRUN)
    assert run.code != 0
    assert run.left == []
    assert run.json("run")["status"] == "interrupted"
    again = faulty(tmp_path, "run.id=a").ended()  # by torchrun: tests/slurm/test_scripts.py
    assert "this run was interrupted before; it resumes from " in again.out
    assert "step-00000023.ckpt" in again.out


@pytest.mark.parametrize("what", ["kill_launcher", "kill_everything"])
def test_a_killed_launcher_takes_its_ranks_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """And what they keep in the temporary directory; where nobody survives, the next start removes that."""
    temporary = Path(tempfile.mkdtemp(prefix="stop-", dir="/tmp"))  # in a longer one the program would use /tmp itself
    monkeypatch.setenv("TMPDIR", str(temporary))
    same = ("run.id=a", "data.num_workers=1", fault(tmp_path, what, epoch=1, batch=4))
    run = faulty(tmp_path, *same, fresh=what == "kill_launcher", timeout=45)  # ranks would sleep for a minute
    assert run.code == -signal.SIGKILL
    assert run.left == []
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]  # a cache
    assert [name.startswith("syncbn-run-") for name in left] == [True] * (what == "kill_everything")
    again = faulty(tmp_path, *same).ended()
    assert "this run was killed before; it resumes from " in again.out
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path: Path) -> None:
    """A file system of 3 MB, of which nothing is left in epoch 1: really full, in a mount of its own."""
    outputs, kept = tmp_path / "outputs", tmp_path / "kept"
    with own_mount(outputs, "-o size=3m") as mount:
        fill = fault(tmp_path, "fill_disk", epoch=1, batch=4)
        run = faulty(tmp_path, "run.id=a", fill, within=mount.process).ended(1)
        assert run.left == []
        shutil.copytree(mount.seen, kept, ignore=shutil.ignore_patterns("filler"))
    assert "error: rank 0 of 2 (pid " in run.err
    assert "No space left on device" in run.err or "could not be written" in run.err
    checkpoints = sorted((kept / "a" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["best.ckpt", "last.ckpt", "step-00000018.ckpt"]
    for path in checkpoints:
        assert torch.load(path, weights_only=True)["global_step"] == 18
    outputs.rmdir()
    (kept).rename(outputs)
    again = faulty(tmp_path, "run.id=a", fault(tmp_path, "fill_disk", epoch=1, batch=4)).ended()  # there is room again
    assert "step-00000018.ckpt" in again.out


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    made = start(tmp_path, sys.executable, f"{PROJECT}/images.py", str(images), env=environment(), timeout=60)
    assert made.code == 0, made.err
    broken = sorted(images.glob("*/*.png"))[37]
    broken.write_bytes(broken.read_bytes()[:-40])
    data = ("data=images", f"data.folder={images}", "model=mlp", "trainer.max_epochs=1", "logger=csv")
    for workers in (0, 1):
        run = train(tmp_path, "--config-dir", f"{PROJECT}/conf", *data, f"data.num_workers={workers}").ended(1)
        assert run.left == []
        assert f" failed: SampleError: sample 37 of Images ({broken}): OSError: " in run.err
        assert run.err.count("\n") == 1
