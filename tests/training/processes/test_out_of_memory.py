"""What the kernel says of processes that it has killed for lack of memory."""

import signal
from pathlib import Path

import pytest

from syncbn.training.launch import outcome
from syncbn.training.processes import out_of_memory
from syncbn.training.processes.rank_processes import End

EVENTS = "low 0\noom 3\noom_kill {}\noom_group_kill 0\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/jobs/a\n", "sys/fs/cgroup/jobs/a/memory.events", EVENTS),
        (
            "9:cpu:/\n4:memory:/jobs/a\n0::/\n",
            "sys/fs/cgroup/memory/jobs/a/memory.oom_control",
            "under_oom 0\n" + EVENTS,
        ),
        ("0::/jobs/a\n", "proc/vmstat", "nr_free_pages 7\n" + EVENTS),
    ],
)
def test_kills_are_counted_in_the_cgroup_or_else_on_the_machine(
    tmp_path: Path, groups: str, file: str, text: str
) -> None:
    write(tmp_path / "proc" / "vmstat", "oom_kill 100\n")
    write(tmp_path / "proc" / "self" / "cgroup", groups)
    write(tmp_path / file, text.format(2))
    assert out_of_memory.kills(tmp_path) == 2
    write(tmp_path / file, text.format(3))
    assert out_of_memory.kills(tmp_path) == 3


def test_where_nothing_counts_them_there_are_none(tmp_path: Path) -> None:
    assert out_of_memory.kills(tmp_path) == 0


def killed(short_of_memory: bool, error: dict[str, str]) -> End:
    return End(1, 4711, 1 if error else -signal.SIGKILL, dict(error), short_of_memory=short_of_memory)


def test_the_line_names_what_ended_the_rank_and_what_works(tmp_path: Path) -> None:
    def line(*ends: End) -> str:
        return outcome.of(list(ends), [], tmp_path, "resume with: it").message

    well, advice = End(0, 4710, 0), out_of_memory.ADVICE
    known, guessed = line(well, killed(True, {})), line(well, killed(False, {}))
    killed_by = "rank 1 of 2 (pid 4711) was killed by SIGKILL"
    assert known == f"{killed_by}: the kernel ran out of memory; {advice}; resume with: it"
    assert f"{killed_by}, perhaps for lack of memory (see dmesg); resume with: it" in guessed
    message = "DataLoader worker (pid 3) is killed by signal: Killed."
    worker = {"kind": "RuntimeError", "message": message, "trace": "at"}
    assert f"ran out of memory; {advice}; resume with: it" in line(well, killed(True, worker))
    assert advice not in line(well, killed(False, worker))
