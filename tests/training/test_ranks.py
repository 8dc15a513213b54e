"""What the launching process makes of ranks that end in odd ways."""

import os
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from syncbn.training import outcome
from syncbn.training import ranks as ranks_module
from syncbn.training.ranks import End, Ranks, Requests

AT_THE_END = {"hangs": lambda: time.sleep(60), "is aborted": os.abort}


def raise_and_not_end_well(how: str, message: str) -> None:
    """Rank 0 does; rank 1 waits for it for ever."""
    if os.environ["RANK"] == "1":
        time.sleep(60)
    Finalize(None, AT_THE_END[how], exitpriority=1)
    raise ValueError(message)


def sleep(seconds: float) -> None:
    """Rank 0 has ended well long before rank 1."""
    if os.environ["RANK"] == "1":
        time.sleep(seconds)


def watch(tmp_path: Path, entry: Callable[..., None], *args: object) -> list[End]:
    return Ranks(2, entry, args, tmp_path / "ranks").watch(Requests(lambda signum: None), stop_timeout=1)


@pytest.mark.parametrize(("how", "message"), [("hangs", "a server's timeout"), ("is aborted", "the cause")])
def test_a_rank_that_raises_is_to_blame_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    monkeypatch.setattr(ranks_module, "GRACE", 1.0)
    begin = time.monotonic()
    first, second = watch(tmp_path, raise_and_not_end_well, how, message)
    assert time.monotonic() - begin < 30
    assert first.error["kind"] == "ValueError"
    assert first.code < 0
    assert first.hung is None
    assert (second.error, second.code) == ({}, -9)
    line = outcome.of([first, second], [], tmp_path, "go on").message
    assert line.startswith(f"rank 0 of 2 (pid {first.pid}) failed: ValueError: {message} (")


def test_ranks_may_end_at_different_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "GRACE", 0.2)
    assert [end.code for end in watch(tmp_path, sleep, 3.0)] == [0, 0]
