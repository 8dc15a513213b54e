"""How a run ended, from how its ranks ended."""

from pathlib import Path

import pytest

from syncbn.training.launch import outcome
from syncbn.training.processes.rank_processes import End

SETTING = {"kind": "SettingError", "message": "trainer.devices=9: too many", "trace": "..."}
LOST = {"kind": "RuntimeError", "message": "gloo: Connection closed by peer", "trace": "..."}
BROKEN = {"kind": "KeyError", "message": "'x'", "trace": "..."}


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([End(0, 10, 1, SETTING), End(1, 11, 1, LOST)], "trainer.devices=9: too many"),
        ([End(0, 10, 0), End(1, 11, 1, SETTING)], "trainer.devices=9: too many"),
        ([End(0, 10, -9, hung="hung in a step"), End(1, 11, 1, SETTING)], "trainer.devices=9: too many"),
        ([End(0, 10, 1, LOST), End(1, 11, 1, SETTING)], "trainer.devices=9: too many"),
    ],
    ids=["the first rank", "the other rank had finished", "the other rank hung", "the other rank lost it"],
)
def test_a_setting_that_one_rank_refuses_is_the_outcome(tmp_path: Path, ends: list[End], message: str) -> None:
    assert outcome.of(ends, [], tmp_path, "resume") == outcome.Outcome("failed", message, 1, refused=True)


def test_a_failure_of_another_kind_is_no_refusal(tmp_path: Path) -> None:
    ends = [End(0, 10, 0), End(1, 11, 1, BROKEN), End(2, 12, 1, LOST)]
    result = outcome.of(ends, [], tmp_path, "resume")
    assert result.message.startswith("rank 1 of 3 (pid 11) failed: KeyError: 'x'")
    assert not result.refused
    assert (tmp_path / "error.txt").read_text(encoding="utf-8") == "rank 1\n...\nrank 2\n..."


def test_ranks_that_all_hung_are_described(tmp_path: Path) -> None:
    ends = [End(rank, 10 + rank, -9, dict(LOST), hung="hung in a step") for rank in range(2)]
    assert outcome.of(ends, [], tmp_path, "resume").message.startswith(
        "rank 0 of 2 (pid 10) failed: RuntimeError: gloo"
    )
