"""Messages through shared memory with drawn sizes and sleeps, and ranks that are killed or stopped meanwhile."""

import os
import random
import signal
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch

from syncbn.nn.comm import all_reduce, channels, groups, shared_memory
from tests.support.ranks import RankError, Ranks

LIMIT = 3.0  # seconds: the time-out of the group where a rank is stopped
FAULTS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "stopped for a while": signal.SIGSTOP}


def exchange(rank: int, world_size: int, count: int, seed: int) -> int:
    """Sends so many messages; how many sums were right."""
    group = groups.resolve("world")
    assert group is not None
    assert channels.channel(group) is not None
    sizes, sleeps, held = random.Random(seed), random.Random(seed + 1 + rank), 0
    first = world_size * (world_size + 1) / 2
    for step in range(count):
        size = sizes.choice((1, 3, 129, 1025)) if step % 1000 else 2 * shared_memory.CAPACITY + 1
        if sleeps.random() < 0.002:
            time.sleep(sleeps.uniform(0, 0.002))
        x = torch.full((size,), float(rank + 1 + step), dtype=torch.float64)
        total = all_reduce.all_sum(x, group, f"message {step % 7}")
        held += bool((total == first + world_size * step).all())
    return held


def until_stopped(rank: int, world_size: int, place: str, seconds: float) -> str:
    """Sends messages for so long; the error that ended it."""
    group = groups.resolve("world")
    assert group is not None
    channel = channels.channel(group)
    assert channel is not None
    channel.limit = timedelta(seconds=LIMIT)
    Path(place, f"ready-{rank}").touch()
    end, on = time.monotonic() + seconds, 1.0
    try:
        while on:  # the ranks stop at the same message
            more = torch.tensor([float(time.monotonic() < end)], dtype=torch.float64)
            on = all_reduce.all_sum(more, group, "here")[0].item()
    except RuntimeError as error:
        Path(place, f"error-{rank}").write_text(f"{time.time()} {error}", encoding="utf-8")
        return str(error)
    return ""


def strike(pool: Ranks, fault: str, victim: int, after: float, slack: float = 2.0) -> str:
    """What is wrong with how three ranks end of which one meets this fault; empty if nothing is.

    Args:
        pool: of the ranks.
        fault: of ``FAULTS``.
        victim: the rank.
        after: seconds from the first message.
        slack: seconds that the others may take to notice, beyond the time-out where the rank is stopped.
    """
    passing = "while" in fault
    with tempfile.TemporaryDirectory() as place:
        hit: list[float] = []
        thread = threading.Thread(target=_hit, args=(pool, Path(place), fault, victim, after, hit))
        thread.start()
        try:
            pool.run(until_stopped, place, 1.0 + after, world_size=3, timeout=60, fresh=True)
        except RankError as error:
            if fault != "killed":
                return str(error)
        finally:
            thread.join()
        errors = {path.name: path.read_text(encoding="utf-8").split(" ", 1) for path in Path(place).glob("error-*")}
        errors.pop(f"error-{victim}", None)  # a stopped rank finds, when it goes on, that the others have left
    if passing:
        return "; ".join(text for _, text in errors.values())
    if len(errors) != 2:
        return f"{len(errors)} of 2 ranks raised"
    late = slack if fault == "killed" else LIMIT + slack
    wrong = [text for when, text in errors.values() if f"rank {victim} " not in text or float(when) - hit[0] > late]
    return "; ".join(wrong)


def _hit(pool: Ranks, place: Path, fault: str, victim: int, after: float, hit: list[float]) -> None:
    while len(list(place.glob("ready-*"))) < 3:
        time.sleep(0.01)
    time.sleep(after)
    hit.append(time.time())
    os.kill(pool.pids()[victim], FAULTS[fault])
    if fault == "stopped":
        while len(list(place.glob("error-*"))) < 2 and time.time() < hit[0] + 20:
            time.sleep(0.05)
    if fault != "killed":
        time.sleep(0.3)
        os.kill(pool.pids()[victim], signal.SIGCONT)
