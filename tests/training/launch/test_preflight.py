"""What is looked at before any work: each line says what was found, what was expected, how to mend it."""

import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from syncbn.training.callbacks import compare_ranks
from syncbn.training.config.plan import Plan
from syncbn.training.distributed import store
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.launch import preflight
from syncbn.training.launch import rank as run
from tests.training.support.train_command import PROJECT, train

CFG = OmegaConf.create(
    {
        "trainer": {"devices": 2, "num_nodes": 1, "accelerator": "cpu", "precision": "32-true"},
        "data": {"batch_size": 4, "global_batch_size": 8},
        "norm": {"name": "local"},
        "seed": 0,
        "ckpt_path": None,
    }
)
ENVIRONMENT = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 1, which all is well with on rank 0."""
    client = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client.set("syncbn/preflight/0/0", "null")
    monkeypatch.setattr(store, "connect", lambda timeout: client)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_rank_that_has_all_it_needs_passes(rank: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preflight.check(Plan.of(CFG, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "directory", "line"),
    [
        ({"MASTER_PORT": None}, "", r"^launcher: MASTER_PORT not set; start with python train.py, torchrun or"),
        (
            {"WORLD_SIZE": "3"},
            "",
            r"devices=2: on each of trainer.num_nodes=1 nodes, these are 2 ranks, .* started 3; make",
        ),
        ({}, "file", r"^hydra.run.dir=.*/file: rank 1 cannot write there \(Not a directory\)"),
    ],
)
def test_what_this_rank_lacks_is_told_of(
    rank: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str | None], directory: str, line: str
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name, value in environment.items():
        rank.delenv(name) if value is None else rank.setenv(name, value)
    with pytest.raises(SettingError, match=line):
        preflight.check(Plan.of(CFG, tmp_path / directory))


def test_a_rank_that_does_not_come_is_told_of(rank: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rank.setenv("WORLD_SIZE", "3")
    store.connect(0).set_timeout(timedelta(seconds=0.5))
    with pytest.raises(SettingError, match=r"^launcher: rank 2 of 3 did not report within 0.5 s$"):
        store.gathered("preflight", "", 0.5)


def test_what_rank_0_refuses_the_others_hear_and_need_not_be_killed(rank: pytest.MonkeyPatch) -> None:
    """Under torchrun it cannot be seen: that stops all ranks once one has failed."""

    def refuse() -> str:
        raise SettingError("run.id=a: no")

    rank.setenv("TORCHELASTIC_RUN_ID", "a")
    rank.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store.connect(0).set_timeout(timedelta(seconds=0.5))
    for number in ("0", "1"):
        rank.setenv("RANK", number)
        with pytest.raises(AgreedError, match=r"^run.id=a: no$"):
            store.shared("go", refuse if number == "0" else lambda: pytest.fail("rank 1 was asked"))


@pytest.mark.parametrize("launcher", [None, TORCHRUN])
def test_what_one_rank_lacks_is_told_of_once(tmp_path: Path, launcher: list[str] | None) -> None:
    (tmp_path / "outputs/a/.rank-1").mkdir(parents=True)  # where rank 1 would try to write
    run = train(tmp_path, "run.id=a", "logger=csv", launcher=launcher).ended(1)
    assert run.left == []
    line = "error: hydra.run.dir=.*/outputs/a: rank 1 cannot write there \\(Is a directory\\); all ranks must\n"
    assert len(re.findall(line, run.err)) == 1
    assert launcher or re.fullmatch(line, run.err)


def test_half_precision_on_the_cpu_is_told_of(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.precision=16-mixed").ended(1)
    assert run.err == (
        "error: trainer.precision=16-mixed: float16 needs a GPU; on the CPU use 32-true, bf16-mixed or 64-true\n"
    )


def differ(rank: int, world_size: int, run_dir: str, what: str) -> str:
    """On each rank, with one thing that is not as on the other."""
    os.environ.update(ENVIRONMENT | {"RANK": str(rank)})
    cfg = CFG.copy()
    cfg.seed = rank if what == "seed" else 0
    directory = Path(run_dir) / (str(rank) if what == "directory" else "same")
    directory.mkdir(exist_ok=True)

    class Trainer:
        is_global_zero, train_dataloader, num_training_batches = rank == 0, None, rank

    Trainer.world_size = world_size
    try:
        compare_ranks.CompareRanks(Plan.of(cfg, directory)).on_fit_start(Trainer(), None)  # type: ignore[arg-type]
    except SettingError as error:
        return str(error)
    dist.barrier()  # rank 0 has cleared up by then
    return f"well: {sorted(path.name for path in directory.iterdir())}"


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("nothing", "well: []"),
        ("seed", "seed: rank 1 has 1, rank 0 has 0; start all ranks with the same value"),
        ("directory", "rank 1 cannot see the files that rank 0 writes there; use a directory that all nodes share"),
    ],
)
def test_ranks_that_differ_are_told_of_on_every_rank(ranks, tmp_path: Path, what: str, line: str) -> None:
    said = ranks.run(differ, str(tmp_path), what, world_size=2)
    assert all(each.endswith(line) for each in said), said


def test_unequally_many_batches_are_told_of_before_they_hang(tmp_path: Path) -> None:
    run = train(tmp_path, "--config-dir", f"{PROJECT}/conf", "data=unequal", "model=mlp", "logger=csv").ended(1)
    assert run.left == []
    assert (
        "error: data: the ranks have 5, 6 batches per epoch; use a loader with the same number on each rank" in run.err
    )


def test_torchrun_and_settings_must_agree(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.devices=3", launcher=TORCHRUN).ended(1)
    assert "error: trainer.devices=3: torchrun started 2; leave it out, or make them agree\n" in run.err


@pytest.mark.parametrize(("devices", "asked", "threads"), [(1, "", 8), (3, "", 2), (9, "", 1), (3, "5,1", 5)])
def test_ranks_share_the_cores_where_no_number_of_threads_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, asked: str, threads: int
) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(run, "_silence_warnings", lambda: None)
    monkeypatch.setattr(preflight, "check", lambda *_: pytest.fail("so far", pytrace=False))
    cfg = OmegaConf.merge(CFG, {"mode": "train", "trainer": {"devices": devices}})
    assert isinstance(cfg, DictConfig)
    with pytest.raises(pytest.fail.Exception, match="so far"):
        run.run(Plan.of(cfg, tmp_path))
    assert chosen == [threads]
