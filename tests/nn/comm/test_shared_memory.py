"""The all-reduce through shared memory: who uses it, what it returns, and what it says of ranks that do not come."""

import ctypes
import gc
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.nn.comm import all_reduce, channels, groups, shared_memory
from syncbn.nn.comm.shared_memory import CAPACITY, Channel
from tests.nn.support.exchange import FAULTS, exchange, strike
from tests.support.compiled import needs_shared_memory
from tests.support.ranks import RankError, Ranks, messages

pytestmark = needs_shared_memory


def world() -> tuple[dist.ProcessGroup, Channel | None]:
    group = groups.resolve("world")
    assert group is not None
    return group, channels.channel(group)


def opened() -> tuple[dist.ProcessGroup, Channel]:
    group, channel = world()
    assert channel is not None
    return group, channel


def values(rank: int, size: int) -> Tensor:
    """Of very different sizes, so that the order of a sum shows in its last bits."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randn(size, generator=generator, dtype=torch.float64)
    return drawn * 10 ** torch.randint(-9, 9, (size,), generator=generator)


SIZES = (1, 2, 129, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY + 5)


def sums(rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    group, channel = opened()
    found = []
    for size in SIZES * 2:
        before = channel._call
        found.append((all_reduce.all_sum(values(rank, size), group, "here"), channel._call - before))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_sum_is_taken_in_rank_order_in_float64_on_every_rank(ranks: Ranks, world_size: int) -> None:
    for found in ranks.run(sums, world_size=world_size):
        for size, (total, calls) in zip(SIZES * 2, found, strict=True):
            expected = values(0, size)
            for rank in range(1, world_size):
                expected = expected + values(rank, size)
            assert torch.equal(total, expected)
            assert calls == -(-size // CAPACITY)


def test_a_message_without_numbers_is_none(ranks: Ranks) -> None:
    assert ranks.run(empty_message, world_size=2) == [0, 0]


def empty_message(rank: int, world_size: int) -> int:
    return len(all_reduce.all_sum(torch.empty(0, dtype=torch.float64), opened()[0], "here"))


# Who uses it


def trained(rank: int, world_size: int, change: str = "", on: int = 1) -> tuple[str, list[Tensor], int]:
    """A layer's step where sharing fails on one rank in the way of ``change``; what it says, and the gradients."""
    said: list[str] = []
    gc.collect()  # what earlier tests have left
    before = mapped()
    note = mock.patch.object(channels.log, "info", lambda text, *arguments: said.append(text % arguments))
    soon = mock.patch.object(channels, "PROBE", timedelta(seconds=1 if change == "did not arrive" else 30))
    with note, soon, FAILURES[change]() if change and rank == on else nullcontext():
        layer = syncbn.SyncBatchNorm1d(3)
        x = torch.arange(12, dtype=torch.float32).reshape(4, 3).sin().add(rank).requires_grad_()
        with messages() as sent:
            layer(x).square().mul(torch.arange(3)).sum().backward()
    assert sent.operations == ["allreduce", "allreduce"]
    assert x.grad is not None
    gc.collect()
    assert mapped() - before == (0 if change else 1)  # what was not used is given back
    return "".join(said), [x.grad, layer.running_mean, layer.running_var], sent.shared


def refused(*_: Any) -> Any:
    raise PermissionError(1, "Operation not permitted")


def not_shared(pid: int, descriptor: int, size: int) -> tuple[int, str]:
    memory, descriptor, why = shared_memory.make_memory(size)
    os.close(descriptor)
    return memory, why


OFFER = channels._offer
FAILURES: dict[str, Callable[[], Any]] = {
    "SYNCBN_SHARED_MEMORY=0": lambda: mock.patch.dict(os.environ, {"SYNCBN_SHARED_MEMORY": "0"}),
    "the compiled code is missing": lambda: mock.patch.object(shared_memory, "library", None),
    "its ranks are in several hosts": lambda: offering(host="another"),
    "its ranks are in several process namespaces": lambda: offering(space="another"),
    "no memory to share": lambda: mock.patch.object(os, "posix_fallocate", refused),
    "cannot open the memory": lambda: mock.patch.object(shared_memory, "_mapped", refused),
    "did not arrive": lambda: mock.patch.object(shared_memory, "open_memory", not_shared),
}


def offering(**changes: str) -> Any:
    return mock.patch.object(channels, "_offer", return_value=OFFER() | changes)


@pytest.mark.parametrize("change", FAILURES)
def test_where_memory_cannot_be_shared_all_ranks_use_gloo(ranks: Ranks, change: str) -> None:
    on = 0 if change == "no memory to share" else 1  # the first rank makes it
    through_memory = ranks.run(trained, world_size=3, fresh=True)
    through_gloo = ranks.run(trained, change, on, world_size=3, fresh=True)
    for (said, found, shared), (said_now, found_now, shared_now) in zip(through_memory, through_gloo, strict=True):
        assert (shared, shared_now) == (2, 0)
        for one, other in zip(found, found_now, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert "share memory" in said if said else True
        assert change in said_now if said_now else True
    assert [bool(said) for said, *_ in through_gloo] == [True, False, False]  # once


def test_the_default_group_and_a_passed_one_share_memory_too(ranks: Ranks) -> None:
    assert ranks.run(groups_of_all_kinds, world_size=4, fresh=True) == [[True, True, True]] * 4


def groups_of_all_kinds(rank: int, world_size: int) -> list[bool]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with mock.patch.dict(os.environ, {"SYNCBN_OWN_GROUP": "0"}):
        found = [groups.resolve("world"), groups.resolve(2), groups.resolve(groups.parse(pairs[rank // 2]))]
    assert found[0] is dist.group.WORLD
    for group in found:
        assert group is not None
        total = all_reduce.all_sum(torch.full((5,), float(rank), dtype=torch.float64), group, "here")
        assert total.tolist() == [sum(dist.get_process_group_ranks(group))] * 5
    return [channels.channel(group) is not None for group in found if group is not None]


def test_two_groups_in_two_threads(ranks: Ranks) -> None:
    ranks.run(two_threads, world_size=3, fresh=True)


def two_threads(rank: int, world_size: int) -> None:
    made = [dist.new_group() for _ in range(2)]
    found = [groups.resolve(groups.parse(group)) for group in made]
    failed: list[BaseException] = []

    def send(group: Any, factor: int) -> None:
        try:
            for step in range(300):
                x = torch.full((7,), float(rank + step), dtype=torch.float64)
                assert all_reduce.all_sum(x, group, "here").tolist() == [3.0 + 3 * step] * 7
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=send, args=(group, number)) for number, group in enumerate(found)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


# What is left, and who else may use it


def another_world(rank: int, world_size: int, store: Path) -> None:
    """The harness keeps its own process group."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def test_nothing_is_left_of_it(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(after_destruction, tmp_path / "store", world_size=2)


def mapped() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:syncbn")


def after_destruction(rank: int, world_size: int, store: Path) -> None:
    another_world(rank, world_size, store)
    gc.collect()  # what earlier tests have left
    before = mapped()
    opened()
    open_files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert mapped() == before + 1
    assert not [file for file in open_files if "memfd:syncbn" in file]  # so nobody else can open it, by no name
    assert not any("syncbn" in path.name for path in Path("/dev/shm").iterdir())
    dist.destroy_process_group()
    gc.collect()
    assert mapped() == before


def test_a_forked_process_has_no_part_in_it(ranks: Ranks) -> None:
    ranks.run(forked, world_size=2)


def forked(rank: int, world_size: int) -> None:
    group, channel = opened()
    pid = os.fork()
    if pid == 0:
        taken = channel.takes(torch.ones(3, dtype=torch.float64))
        del channel
        gc.collect()
        channels._channels.clear()
        os._exit(int(taken))
    assert os.waitpid(pid, 0)[1] == 0
    time.sleep(0.5 * rank)  # rank 0 waits, and would be told if its child had left in its name
    assert all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "here").tolist() == [2.0] * 3


def test_calls_are_counted_beyond_32_bits(ranks: Ranks) -> None:
    ranks.run(around_the_end, world_size=3, fresh=True)


def around_the_end(rank: int, world_size: int) -> None:
    group, channel = opened()
    dist.barrier()
    channel._call = 2**32 - 4
    if rank == 0:
        ctypes.c_uint32.from_address(channel._address).value = (2**32 - 4) * world_size % 2**32
        ctypes.c_uint32.from_address(channel._address + 64).value = 2**32 - 4
    dist.barrier()
    for step in range(9):
        assert all_reduce.all_sum(torch.full((2,), 1.0 * step).double(), group, "here").tolist() == [3.0 * step] * 2
    assert channel._call == 5


# Ranks that are out of step, late, stopped or gone


def out_of_step(rank: int, world_size: int, size: int) -> tuple[str, list[float]]:
    group, _ = opened()
    with pytest.raises(RuntimeError) as raised:
        all_reduce.all_sum(torch.ones(size if rank else 3, dtype=torch.float64), group, "a forward" if rank else "b")
    return str(raised.value), all_reduce.all_sum(torch.ones(1, dtype=torch.float64), group, "c").tolist()


@pytest.mark.parametrize("size", [3, 4])
def test_ranks_out_of_step_are_told_both_places_without_debug_mode(ranks: Ranks, size: int) -> None:
    zero, one, two = ranks.run(out_of_step, size, world_size=3)
    at = f"a forward, {size} numbers"
    assert zero[0] == f"layer b: rank 1, 2 is at {at}, and this rank at b, 3 numbers"
    assert one[0] == two[0] == f"layer a forward: rank 0 is at b, 3 numbers, and this rank at {at}"
    assert zero[1] == one[1] == two[1] == [3.0]  # the next message goes through


def swapped(rank: int, world_size: int) -> None:
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    x = torch.randn(4, 3)
    model[rank](model[1 - rank](x))


def test_layers_that_run_in_another_order_are_named(ranks: Ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(swapped, world_size=2)
    assert "layer 1 forward: rank 1 is at 0 forward, 8 numbers, and this rank at 1 forward, 8 numbers" in str(
        raised.value
    )
    assert "layer 0 forward: rank 0 is at 1 forward, 8 numbers, and this rank at 0 forward, 8 numbers" in str(
        raised.value
    )


def one_does_not_come(rank: int, world_size: int, what: str, place: Path) -> tuple[str, float]:
    """The error of a rank that waits for the last one, and after how many seconds."""
    another_world(rank, world_size, place / "store")
    group, channel = opened()
    channel.limit = timedelta(seconds=4 if what == "stopped" else 50)
    all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "here")
    if rank == world_size - 1:
        (place / "gone").touch()
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "left":
            dist.destroy_process_group()
            del channel, group
            gc.collect()
            end = time.monotonic() + 40
            while len(errors(place)) < 2 and time.monotonic() < end:
                time.sleep(0.05)
        return "", 0.0
    while not (place / "gone").exists():
        time.sleep(0.01)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "there")
    seconds = time.monotonic() - start
    (place / f"error-{rank}").write_text(f"{seconds} {raised.value}", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"cannot be used since an earlier error: .*rank 2 "):
        all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "there")
    return str(raised.value), seconds


def errors(place: Path) -> list[tuple[float, str]]:
    found = [path.read_text(encoding="utf-8").split(" ", 1) for path in sorted(place.glob("error-*"))]
    return [(float(seconds), text) for seconds, text in found]


def test_a_killed_rank_is_noticed_within_a_second(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 2 died: killed by SIGKILL"):
        ranks.run(one_does_not_come, "killed", tmp_path, world_size=3, fresh=True)
    found = errors(tmp_path)
    assert len(found) == 2
    for seconds, text in found:
        assert seconds < 5  # one second on a machine that has nothing else to do
        assert text == "layer there: shared memory: rank 2 has ended"


def test_a_stopped_rank_is_named_after_the_time_out(ranks: Ranks, tmp_path: Path) -> None:
    thread = threading.Thread(target=wake, args=(ranks, tmp_path))
    thread.start()
    try:
        ranks.run(one_does_not_come, "stopped", tmp_path, world_size=3, fresh=True)
    finally:
        thread.join()
    found = errors(tmp_path)
    assert len(found) == 2
    late = "layer there: Timed out in shared memory: rank 2 did not come within 4 s"
    for seconds, text in found:
        assert seconds > 3
        assert text == late


def wake(ranks: Ranks, place: Path) -> None:
    while len(errors(place)) < 2:
        time.sleep(0.05)
    for pid in ranks.pids():
        os.kill(pid, signal.SIGCONT)


def test_a_rank_that_destroys_its_group_is_noticed_at_once(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(one_does_not_come, "left", tmp_path, world_size=3, fresh=True)
    for seconds, text in errors(tmp_path):
        assert seconds < 30  # neither its end nor the time-out
        assert text == "layer there: shared memory: rank 2 no longer takes part"


class AlarmError(Exception):
    """Raised by a signal's handler."""


def interrupted(rank: int, world_size: int) -> str:
    group, _ = opened()

    def ring(*_: object) -> None:
        raise AlarmError

    if rank == 0:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(AlarmError):  # while it waits for rank 1
            all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "here")
        with pytest.raises(RuntimeError, match="since an earlier error: AlarmError"):
            all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "here")
        dist.destroy_process_group()  # the next test shall not get it
        return ""
    time.sleep(1.0)
    all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "here")  # rank 0 had sent its part
    with pytest.raises(RuntimeError) as raised:
        all_reduce.all_sum(torch.ones(3, dtype=torch.float64), group, "here")
    dist.destroy_process_group()
    return str(raised.value)


def test_a_signals_handler_runs_while_a_rank_waits_and_the_others_do_not_wait_for_it(ranks: Ranks) -> None:
    said = ranks.run(interrupted, world_size=2, fresh=True)[1]
    assert "shared memory: " in said
    assert "rank 0 no longer takes part" in said


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_sum_is_right_with_drawn_sizes_and_sleeps(ranks: Ranks, world_size: int) -> None:
    """``make prove-exchange`` sends a million."""
    count = 4000 // world_size
    assert ranks.run(exchange, count, 1, world_size=world_size) == [count] * world_size


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_a_random_moment(ranks: Ranks, fault: str) -> None:
    assert strike(ranks, fault, victim=1, after=0.2, slack=20.0) == ""  # other tests run meanwhile


# The protocol


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_no_access_is_unordered(tmp_path: Path, threads: int) -> None:
    """ThreadSanitizer on the C code itself, with threads for ranks."""
    source, program = Path(__file__).parents[1] / "kernels/shared_memory_threads.c", tmp_path / "threads"
    compiler = shutil.which("gcc") or "cc"
    flags = ["-O1", "-g", "-fsanitize=thread", "-pthread"]
    subprocess.run([compiler, *flags, "-o", program, source], check=True, capture_output=True)
    calls = 4000 // threads
    done = subprocess.run(
        [program, str(threads), str(calls)], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.stdout == f"{calls} calls on {threads} ranks\n", done.stderr
    assert done.returncode == 0, done.stderr
