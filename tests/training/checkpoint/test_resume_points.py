"""Interrupted and resumed is the same as not interrupted, to the last bit; and what is to be said otherwise."""

import os
import random
import shlex
from pathlib import Path

import pytest
import torch

from tests.training.support.faulty_runs import differences, draw, fault, faulty, killed_and_resumed, uninterrupted
from tests.training.support.train_command import Run, train

SEED = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Runs that were not interrupted, by number of ranks; with loader processes, which are not to matter."""
    return {ranks: uninterrupted(tmp_path_factory.mktemp(f"straight-{ranks}"), 2, ranks) for ranks in (1, 2)}


@pytest.mark.parametrize(
    ("where", "workers", "ranks"),
    [("the first step", 2, 1), ("an epoch's last batch", 0, 2), ("validation", 0, 1), ("a step", 2, 2)],
)
def test_killed_and_resumed_ends_as_if_nothing_had_happened(
    tmp_path: Path, straight: dict[int, Run], where: str, workers: int, ranks: int
) -> None:
    drawn = draw(random.Random(f"{SEED} {where}"), where, workers, ranks)
    print(f"FAULT_SEED={SEED}: {drawn}")
    killed, resumed = killed_and_resumed(tmp_path, drawn)
    assert killed.code == -9
    assert killed.left == []
    assert "this run was killed before; it " in resumed.out
    assert resumed.code == 0, resumed.err
    assert differences(straight[ranks], resumed) == []


def test_what_is_compared_differs_between_seeds(tmp_path: Path, straight: dict[int, Run]) -> None:
    other = faulty(tmp_path, "trainer.devices=1", "data.global_batch_size=64", "seed=1", "run.id=straight")
    found = " ".join(differences(straight[1], other))
    for part in ("state_dict", "optimizer_states", "running_mean", "random", "csv", "result/test"):
        assert part in found, part


def test_another_world_size_with_the_same_global_batch_goes_on(tmp_path: Path) -> None:
    """Weights, optimizer and the order of the data carry over; without dropout it is the same training to rounding."""
    settings = ("model=mlp", "module=classifier", "data.global_batch_size=64", "trainer.precision=64-true")
    ends = {}
    for name in ("straight", "changed"):
        stop = [fault(tmp_path, "terminate", epoch=1, batch=9)] if name == "changed" else []
        first = faulty(tmp_path, *settings, f"run.id={name}", "trainer.devices=2", *stop)
        if name == "changed":
            assert first.code == 143, first.err
            first = faulty(tmp_path, *settings, f"run.id={name}", "trainer.devices=1")
            assert "the checkpoint was trained with 2 processes and resumes with 1" in first.out
        assert first.code == 0, first.err
        ends[name] = torch.load(first.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in ends["straight"].items():
        torch.testing.assert_close(ends["changed"][key], value, rtol=0, atol=1e-9)


def test_another_global_batch_is_refused(tmp_path: Path) -> None:
    first = faulty(tmp_path, "run.id=a", "data.global_batch_size=64", fault(tmp_path, "terminate", epoch=1)).ended(143)
    second = faulty(tmp_path, "run.id=a", "data.global_batch_size=32").ended(1)
    assert second.err.startswith("error: data.global_batch_size=32: ")
    assert "was trained with 64" in second.err
    assert first.json("run")["status"] == "interrupted"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, straight: dict[int, Run]) -> None:
    same = ("trainer.devices=1", "data.global_batch_size=64", "run.id=resumed", "resume.every_n_steps=5")
    first = faulty(tmp_path, *same, fault(tmp_path, "kill_everything", epoch=2, batch=8))
    points = sorted((first.directory / "checkpoints").glob("step-*.ckpt"))  # type: ignore[operator]
    assert len(points) == 2
    whole = bytearray(points[1].read_bytes())
    points[1].unlink()  # not last.ckpt, which is the same file
    whole[len(whole) // 2] ^= 1  # the other ways are in test_files.py
    points[1].write_bytes(whole)
    second = faulty(tmp_path, *same).ended()
    assert f"{points[1].name} is damaged (" in second.out
    assert f"it resumes from {points[0].relative_to(tmp_path)}" in second.out
    assert differences(straight[1], second) == []


def test_a_run_that_has_finished_is_not_run_again(tmp_path: Path) -> None:
    first = faulty(tmp_path, "run.id=a", "trainer.max_epochs=1")
    again = faulty(tmp_path, "run.id=a", "trainer.max_epochs=1").ended()
    assert "run a has finished before" in again.out
    assert first.out.splitlines()[-8:] == again.out.splitlines()[-8:]  # the table
    other = faulty(tmp_path, "run.id=a", "trainer.max_epochs=1", "seed=7").ended(1)
    assert other.err == (
        "error: run.id=a: this run has finished with other settings (data.seed=0 -> 7, seed=0 -> 7); use another id\n"
    )
    more = faulty(tmp_path, "run.id=a", "trainer.max_epochs=2").ended()
    assert more.json("result")["epochs"] == 2
    assert "epoch 1/2" not in more.out


def test_a_run_killed_in_its_test_only_tests(tmp_path: Path) -> None:
    same = ("run.id=a", "trainer.max_epochs=1", fault(tmp_path, "kill_everything", hook="on_test_batch_end"))
    assert faulty(tmp_path, *same).code == -9
    second = faulty(tmp_path, *same).ended()
    assert "epoch" not in [line.split()[0] for line in second.out.splitlines() if line.strip()]
    assert second.json("result")["test"]["test/count"] == 360


def test_settings_that_changed_are_said(tmp_path: Path) -> None:
    assert faulty(tmp_path, "run.id=a", fault(tmp_path, "terminate", epoch=1)).code == 143
    second = faulty(tmp_path, "run.id=a", "module.label_smoothing=0.1", "trainer.max_epochs=2").ended()
    assert "settings that changed since the last attempt: callbacks.fault." in second.out
    assert ", module.label_smoothing=0.0 -> 0.1\n" in second.out


def test_two_processes_cannot_be_at_one_run(tmp_path: Path) -> None:
    nested = f"+callbacks.nested={{_target_: faults.Nested, path: {tmp_path / 'said'}}}"
    faulty(tmp_path, "run.id=a", "trainer.max_epochs=1", nested).ended()
    code, said = (tmp_path / "said").read_text(encoding="utf-8").split(" ", 1)
    assert code == "1"
    assert said.startswith("error: run.id=a: process ")
    assert "is running this run already; wait for it, or stop it" in said


def test_a_run_begun_from_another_ones_checkpoint_goes_on_by_the_same_command_or_the_printed_one(
    tmp_path: Path,
) -> None:
    faulty(tmp_path, "run.id=base", "trainer.max_epochs=1").ended()
    same = ("hydra.run.dir='elsewhere/b c'", "ckpt_path=outputs/base/checkpoints/last.ckpt", "trainer.max_epochs=3")
    stops = [fault(tmp_path, "terminate", epoch=epoch) for epoch in (1, 2)]
    faulty(tmp_path, *same, stops[0]).ended(143)
    (tmp_path / "once").unlink()
    second = faulty(tmp_path, *same, stops[1]).ended(143)
    assert "this run was interrupted before; it resumes from elsewhere/b c/checkpoints/step-00000020.ckpt" in second.out
    words = shlex.split(second.err.splitlines()[-1].split("resume with: ")[1])
    assert words[0] == "python"
    third = train(tmp_path, *words[2:]).ended()
    assert "this run was interrupted before; it resumes from elsewhere/b c/checkpoints/step-00000038.ckpt" in third.out
    assert faulty(tmp_path, *same, stops[1]).out.startswith("run b c has finished before")
