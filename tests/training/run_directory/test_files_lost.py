"""Files that are lost or cannot be written while a run trains: one line says which, and nothing saved is lost."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from syncbn.training.processes import rank_error
from tests.training.support.faulty_runs import differences, fault, faulty
from tests.training.support.own_mount import own_mount
from tests.training.support.train_command import Run

ONE = ("trainer.devices=1", "data.global_batch_size=64", "run.id=a")


@pytest.mark.parametrize(("ours", "workers"), [(True, 2), (False, 0), (False, 2)])
def test_a_data_file_that_is_removed_is_named(tmp_path: Path, ours: bool, workers: int) -> None:
    data = ("data._target_=loops.Files", f"+data.directory={tmp_path}/files", f"+data.ours={str(ours).lower()}")
    removes = f"+callbacks.removes={{_target_: loops.Removes, path: {tmp_path}/files/3.pt}}"
    run = faulty(tmp_path, *ONE, *data, f"data.num_workers={workers}", removes).ended(1)
    (line,) = run.err.splitlines()
    assert line.startswith("error: rank 0 of 1 (pid ")
    assert f"No such file or directory: '{tmp_path}/files/3.pt'" in line
    assert "resume with: python " in line
    assert "Traceback" not in line
    if not ours:
        assert "FileNotFoundError: [Errno 2] " in line
        assert ("DataLoader worker process" in line) == (workers > 0)
        assert re.search(r"project/loops\.py:\d+, traceback: outputs/a/error\.txt\)", line), line
    torch.save(3, tmp_path / "files/3.pt")
    faulty(tmp_path, *ONE, *data, f"data.num_workers={workers}").ended()


def test_the_message_of_a_worker_is_its_exceptions(tmp_path: Path) -> None:
    trace = '  File "/a/data.py", line 7, in __getitem__\n    return open(path)\n           ^^^^\n'
    deep = '  File "/b/site-packages/torch/fetch.py", line 54, in fetch\n    data = self.dataset[i]\n' * 40
    text = "Caught ValueError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
    about = rank_error.describe(ValueError(f"{text}{deep}{trace}ValueError: no: such\nlabel\n"))
    assert about["message"] == "no: such label (DataLoader worker process 1)"
    assert about["place"] == "/a/data.py:7"
    assert rank_error.describe(ValueError("plain"))["message"] == "plain"


def test_a_directory_that_becomes_read_only_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    """The command twice, in a mount of its own, which is writable again in between."""
    straight = faulty(tmp_path, *ONE).ended()
    where = tmp_path / "mount"
    same = (*ONE, "resume.every_n_steps=5", f"+callbacks.mount={{_target_: loops.ReadOnly, once: {tmp_path}/once}}")
    with own_mount(where) as mount:
        first = faulty(where, *same, within=mount.process).ended(1)
        newest = max(path.name for path in mount.seen.glob("outputs/a/checkpoints/step-*.ckpt"))
        mount.call("umount", str(where))
        second = faulty(where, *same, within=mount.process).ended()
        shutil.copytree(mount.seen / "outputs", where / "outputs")
    (line,) = first.err.splitlines()
    assert "Read-only file system" in line
    assert "make room" not in line
    assert "Traceback" not in line
    assert newest >= "step-00000020.ckpt"
    assert f"it resumes from outputs/a/checkpoints/{newest}" in second.out
    assert differences(straight, Run(0, "", "", where / "outputs/a", [])) == []


def damage(path: Path) -> None:
    """Changes a byte, in a file of its own: last.ckpt is another name of a resume point."""
    whole = bytearray(path.read_bytes())
    path.unlink()
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("stopped", ["in the last epoch", "in the test"])
def test_a_damaged_best_checkpoint_is_reported_and_is_not_tested(tmp_path: Path, stopped: str) -> None:
    at = {"epoch": 2, "batch": 4} if stopped == "in the last epoch" else {"hook": "on_test_batch_end"}
    same = ("trainer.devices=2", "data.global_batch_size=64", "run.id=a", fault(tmp_path, "kill_everything", **at))
    assert faulty(tmp_path, *same).code == -9
    best = tmp_path / "outputs/a/checkpoints/best.ckpt"
    damage(best)
    again = faulty(tmp_path, *same).ended()
    line = r"best\.ckpt is damaged \(.+\): it is no longer the best checkpoint, and is not tested\n"
    assert re.search(line, again.out)
    result = again.json("result")
    if stopped == "in the test":
        assert (result["checkpoint"], result["tested"]) == (None, "final weights")
    else:  # the last epoch's, as there is no other
        assert (result["checkpoint"], result["tested"]) == (str(best), "checkpoint")
        assert torch.load(best, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("last", ["damaged", "sound"])
def test_where_every_resume_point_is_damaged_the_last_one_is_used_or_the_run_begins_anew(
    tmp_path: Path, last: str
) -> None:
    """The last one is a file of its own where the file system has no links."""
    same = (*ONE, fault(tmp_path, "kill_everything", epoch=2, batch=4))
    faulty(tmp_path, *same).ended(-9)
    points = sorted((tmp_path / "outputs/a/checkpoints").glob("step-*.ckpt"))
    assert len(points) == 2
    for path in (*points, points[0].with_name("last.ckpt")) if last == "damaged" else points:
        damage(path)
    again = faulty(tmp_path, *same).ended()
    assert all(f"{path.name} is damaged (" in again.out for path in points)
    if last == "damaged":
        assert "starts over" in again.out
        assert again.json("result")["steps"] == 3 * 18
    else:
        assert "it resumes from outputs/a/checkpoints/last.ckpt" in again.out
        assert again.json("result")["epochs_before"] == 2
