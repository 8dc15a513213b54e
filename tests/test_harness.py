"""The harness itself: whatever a rank does, a test ends, soon, and says what happened on every rank."""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, Ranks, messages


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """A pool of these tests' own: they break it, and should not cost the others theirs."""
    pool = Ranks(grace=2.0)
    yield pool
    pool.close()


def total_of_ranks(rank: int, world_size: int, factor: int = 1) -> tuple[int, int, float]:
    x = torch.tensor(float(rank * factor))
    dist.all_reduce(x)
    return os.getpid(), dist.get_world_size(), x.item()


def works(pool: Ranks) -> bool:
    return [total for _, _, total in pool.run(total_of_ranks, world_size=2, timeout=20)] == [1.0, 1.0]


def goes_missing(rank: int, world_size: int) -> None:
    time.sleep(100)


def waits_for_the_other(rank: int, world_size: int) -> None:
    dist.all_reduce(torch.ones(1))


def one_reduces_alone(rank: int, world_size: int) -> None:
    (waits_for_the_other if rank == 0 else goes_missing)(rank, world_size)


def one_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise LookupError("no such thing here")
    waits_for_the_other(rank, world_size)


def one_is_killed(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    waits_for_the_other(rank, world_size)


def one_exits(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def returns_what_cannot_be_sent(rank: int, world_size: int) -> object:
    return lambda: rank


def warns(rank: int, world_size: int) -> str:
    warnings.warn("take care", UserWarning, stacklevel=1)
    return "went on"


def destroys_the_group(rank: int, world_size: int) -> None:
    dist.destroy_process_group()


def sends_one_of_each(rank: int, world_size: int) -> dict[str, object]:
    x, parts = torch.ones(5), [torch.empty(5) for _ in range(world_size)]
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "all_gather": lambda: dist.all_gather(parts, x),
        "all_gather_object": lambda: dist.all_gather_object([None] * world_size, "word"),
        "barrier": dist.barrier,
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(world_size), torch.ones(world_size)),
        "send or recv": lambda: dist.send(x, 1) if rank == 0 else dist.recv(x, 0),
    }
    seen = {}
    for name, call in calls.items():
        with messages() as sent:
            call()
        seen[name] = sent
    with messages() as sent:
        x + 1
    return {**seen, "nothing": sent}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_by_rank_and_processes_are_reused(pool: Ranks) -> None:
    first = pool.run(total_of_ranks, 10, world_size=2)
    again = pool.run(total_of_ranks, world_size=2)
    alone = pool.run(total_of_ranks, world_size=1)
    assert [rest for _, *rest in first] == [[2, 10.0], [2, 10.0]]
    assert [pid for pid, *_ in first] == [pid for pid, *_ in again] == pool.pids()
    assert alone == [(pool.pids()[0], 1, 0.0)]


def test_a_hang_fails_with_the_stacks_of_all_ranks(pool: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as failure:
        pool.run(one_reduces_alone, world_size=2, timeout=3)
    assert time.monotonic() - start < 30
    stack_of_0, stack_of_1 = str(failure.value).split("rank 1 did not end")
    assert "rank 0 did not end" in stack_of_0
    assert "in waits_for_the_other" in stack_of_0
    assert "in goes_missing" in stack_of_1
    assert works(pool)


def test_an_exception_is_reported_with_its_rank_and_the_stack_of_the_one_left_waiting(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1 raised LookupError") as failure:
        pool.run(one_raises, world_size=2, timeout=60)
    assert failure.value.raised == {1: "LookupError"}
    assert "no such thing here" in str(failure.value)
    assert "in waits_for_the_other" in str(failure.value)
    assert works(pool)


def test_a_killed_rank_is_named(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1 died: killed by SIGKILL"):
        pool.run(one_is_killed, world_size=2, timeout=60)
    assert works(pool)


def test_a_rank_that_exits_is_named_and_the_others_are_said_to_be_well(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1 died: exit code 7") as failure:
        pool.run(one_exits, world_size=2)
    assert "rank 0 ended well" in str(failure.value)
    assert works(pool)


def test_a_rank_that_dies_between_two_runs_is_named(pool: Ranks) -> None:
    assert works(pool)
    os.kill(pool.pids()[1], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 died"):
        pool.run(total_of_ranks, world_size=2, timeout=20)
    assert works(pool)


def test_a_result_that_cannot_be_sent_is_an_error(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0 raised"):
        pool.run(returns_what_cannot_be_sent, world_size=1)


def test_a_warning_on_a_rank_is_an_error(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0 raised UserWarning"):
        pool.run(warns, world_size=1)


@pytest.mark.filterwarnings("ignore:take care")
def test_a_warning_that_the_test_ignores_is_ignored_on_the_ranks(pool: Ranks) -> None:
    assert pool.run(warns, world_size=1) == ["went on"]


def test_a_destroyed_process_group_is_made_anew(pool: Ranks) -> None:
    pool.run(destroys_the_group, world_size=2)
    assert works(pool)


def test_the_message_counter_sees_every_kind_of_message(pool: Ranks) -> None:
    for rank, seen in enumerate(pool.run(sends_one_of_each, world_size=2)):
        assert seen.pop("nothing").operations == []
        assert {name: sent.operations for name, sent in seen.items()} == {
            "all_reduce": ["allreduce"],
            "broadcast": ["broadcast"],
            "all_gather": ["allgather"],
            "all_gather_object": ["allgather", "allgather"],
            "barrier": ["barrier"],
            "all_to_all_single": ["alltoall_base"],
            "send or recv": ["send" if rank == 0 else "recv"],
        }
        assert seen["all_reduce"].payloads == [("all_reduce", [5], "float")]


def test_closing_leaves_no_process_behind() -> None:
    pool = Ranks()
    pool.run(total_of_ranks, world_size=2)
    pids = pool.pids()
    assert all(map(is_running, pids))
    pool.close()
    assert not any(map(is_running, pids))
