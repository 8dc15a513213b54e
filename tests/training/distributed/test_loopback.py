"""On one machine nothing listens beyond the loopback interface."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from syncbn.doctor import selftest_ranks
from syncbn.doctor.selftest_ranks import Place, ReportStage
from syncbn.training.distributed import loopback
from syncbn.training.processes.rank_processes import Ranks, Requests

ADDRESSES = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, ::1


def listening() -> set[str]:
    """The addresses at which this process listens, as /proc/net has them."""
    sockets = set()
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(each.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:  # TCP_LISTEN, inode
                found.add(fields[1].split(":")[0])
    return found


def listen_in_groups() -> dict[str, object]:
    """Of a rank that has sent something in the world, and in a group."""
    dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1), group=dist.new_group([*range(dist.get_world_size())]))
    return {"at": sorted(listening()), "by": os.environ["GLOO_SOCKET_IFNAME"]}


def write_where(place: Path) -> None:
    dist.init_process_group("gloo")
    (place / os.environ["RANK"]).write_text(json.dumps(listen_in_groups()), encoding="utf-8")
    dist.destroy_process_group()


def tell_where(rank: int, place: Place, report_stage: ReportStage) -> dict[str, object]:
    return listen_in_groups()


def test_a_runs_launcher_and_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before = listening()
    ranks = Ranks(2, write_where, (tmp_path,), tmp_path / "ranks")
    mine = listening()
    assert [end.code for end in ranks.watch(Requests(), 10)] == [0, 0]
    assert mine - before <= ADDRESSES
    assert mine & ADDRESSES
    for rank in ("0", "1"):
        said = json.loads((tmp_path / rank).read_text(encoding="utf-8"))
        assert said["by"] == "lo"
        assert said["at"]
        assert set(said["at"]) <= ADDRESSES


def test_the_self_test_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    (said,) = selftest_ranks.on_ranks(Place("cpu", "gloo", 1), tell_where, 100)
    assert said["by"] == "lo"
    assert set(said["at"]) <= ADDRESSES


def test_the_store_listens_where_it_is_asked_to() -> None:
    before = listening()
    store = loopback.start_store()
    assert listening() - before == {"0100007F"} - before
    with socket.socket() as taken:  # the port that a job's ranks agree on
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    agreed = loopback.start_store(port=port)
    assert agreed.port == port
    agreed.set("a", "b")
    assert store.port != port


def test_an_interface_that_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert loopback.within_machine() == {"NCCL_SOCKET_IFNAME": "lo"}


def test_a_machine_without_a_loopback_interface_of_a_known_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "eth0")])
    assert loopback.within_machine() == {}
