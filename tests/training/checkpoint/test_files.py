"""Checkpoint files: whole or not there, and what is wrong with one that is damaged."""

import os
from pathlib import Path

import pytest
import torch

from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.atomic_io import AtomicCheckpointIO, SaveError

STATE = {"weights": torch.arange(1000.0), "epoch": 3}
DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a bit changed": lambda data: data[:2500] + bytes([data[2500] ^ 1]) + data[2501:],
    "empty": lambda data: b"",
    "something else": lambda data: b"hello" * 100,
    "zeros in the middle": lambda data: data[:1500] + bytes(1000) + data[2500:],
}


@pytest.fixture
def points(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"step-{step:08d}.ckpt" for step in (5, 9, 10)]
    for path in paths:
        AtomicCheckpointIO().save_checkpoint(STATE, path)
    return paths


def test_a_whole_one_is_sound_and_nothing_else_is_left(points: list[Path]) -> None:
    assert [files.damage(path) for path in points] == [None] * 3
    assert sorted(points[0].parent.iterdir()) == points
    assert torch.equal(torch.load(points[0], weights_only=True)["weights"], STATE["weights"])


def test_files_of_other_names_are_no_resume_points(points: list[Path]) -> None:
    for name in ("step-step=4.ckpt", "step-4.ckpt", "step-00000011-v1.ckpt", "step-.ckpt"):
        points[0].with_name(name).write_bytes(b"of another callback")
    far = points[0].with_name("step-100000000.ckpt")
    AtomicCheckpointIO().save_checkpoint(STATE, far)
    assert files.points(points[0].parent) == [*points, far]
    assert files.newest(points[0].parent, pytest.fail) == far


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.ckpt")
    assert files.damage(tmp_path / "last.ckpt") == "it is not a regular file"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_reported_and_passed_over(points: list[Path], how: str) -> None:
    points[2].write_bytes(DAMAGES[how](points[2].read_bytes()))
    said: list[str] = []
    assert files.newest(points[0].parent, said.append) == points[1]
    assert len(said) == 1
    assert said[0].startswith("step-00000010.ckpt is damaged (")
    assert said[0].endswith("): it is skipped, and the previous checkpoint is tried")


def test_any_changed_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """In headers too, which the checksums do not cover; most of the bytes of padding matter to nobody."""
    path, state = tmp_path / "a.ckpt", {"weights": torch.arange(20.0), "names": ["x", 2]}
    AtomicCheckpointIO().save_checkpoint(state, path)
    whole = path.read_bytes()
    found = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if files.damage(path):
            found += 1
            continue
        loaded = files.load(path)
        assert torch.equal(loaded["weights"], state["weights"]), place
        assert loaded["names"] == state["names"], place
    assert found > len(whole) / 3


def test_where_all_are_damaged_there_is_none(points: list[Path]) -> None:
    for path in points:
        path.write_bytes(b"")
    assert files.newest(points[0].parent, lambda line: None) is None


@pytest.mark.parametrize("linked", [True, False])
def test_last_is_the_same_file_or_a_copy(points: list[Path], linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linked:
        monkeypatch.setattr("os.link", _refuse)
    for path in points[:2]:
        files.link(path, "last.ckpt")
    last = points[0].with_name("last.ckpt")
    assert last.samefile(points[1]) == linked
    assert last.read_bytes() == points[1].read_bytes()


def test_a_write_that_fails_leaves_what_was_there(points: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = points[0].read_bytes()
    monkeypatch.setattr("os.fsync", _refuse)
    with pytest.raises(SaveError, match=r"step-00000005.ckpt could not be written \(.*not here.* MiB are free there\)"):
        AtomicCheckpointIO().save_checkpoint({"other": 1}, points[0])
    assert points[0].read_bytes() == before
    assert sorted(points[0].parent.iterdir()) == points


def test_what_killed_saves_left_goes_with_the_next_save(points: list[Path]) -> None:
    directory = points[0].parent
    left = [directory / f".step-{step:08d}.ckpt.part" for step in (3, 12, 30)]
    others = [directory / ".another-run.ckpt.part", directory / "step-00000002.part"]  # not ours to judge
    for path in (*left, *others):
        path.write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint(STATE, directory / "step-00000012.ckpt")
    assert sorted(directory.iterdir()) == sorted([*points, *others, directory / "step-00000012.ckpt"])
    assert files.damage(directory / "step-00000012.ckpt") is None


def test_a_copy_that_finds_no_room_leaves_the_last_one(points: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files.link(points[0], "last.ckpt")
    monkeypatch.setattr("os.link", _refuse)
    monkeypatch.setattr(Path, "write_bytes", _write_half)
    with pytest.raises(OSError, match="not here"):
        files.link(points[1], "last.ckpt")
    last = points[0].with_name("last.ckpt")
    assert last.samefile(points[0])
    assert sorted(points[0].parent.iterdir()) == sorted([*points, last])


def _write_half(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents[: len(contents) // 2])
    _refuse()


def _refuse(*_: object) -> None:
    raise OSError("not here")
