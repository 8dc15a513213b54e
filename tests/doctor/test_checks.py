"""Each check of ``syncbn doctor`` by itself, on machines that are not this one."""

import http.server
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from syncbn.doctor import Row, Status, cluster, machine
from syncbn.nn.kernels import cpu, gpu
from tests.training.support.train_command import REPO

KEY = "0123456789abcdef" * 2 + "01234567"


def the(rows: list[Row]) -> Row:
    (row,) = rows
    assert bool(row.fix) is (row.status != Status.ok)
    return row


def test_python_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert the(machine.python()).status == Status.ok
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.10.9")
    row = the(machine.python())
    assert (row.status, row.fix) == (Status.failed, "use Python >=3.11")


def test_packages_outside_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=99", "no-such-package>=1,<2", "numpy>=1", "rich>=99; extra == 'x'", "no-such-extra; extra == 'x'"]
    monkeypatch.setattr(machine, "requires", lambda name: needs)
    every, *wrong = machine.packages()
    assert f"torch {machine.version('torch')}, numpy {machine.version('numpy')}" in every.found
    assert [(row.check, row.status, row.fix) for row in wrong] == [
        ("package torch", Status.failed, "pip install 'torch>=99'"),
        ("package no-such-package", Status.failed, "pip install 'no-such-package<2,>=1'"),
        ("package rich", Status.warning, "pip install 'rich>=99'"),
    ]


def test_constraints_name_the_versions_that_were_tested() -> None:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in machine.TESTED} == machine.TESTED
    assert machine.TESTED.keys() >= {"torch", "lightning", "wandb"}


@pytest.mark.parametrize("name", machine.TESTED)
def test_a_version_newer_than_tested_is_one_row(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tested = machine.TESTED[name]
    installed = dict(machine.TESTED)
    monkeypatch.setattr(machine, "version", installed.__getitem__)
    for same in (tested, f"{tested}+cpu", f"{tested}.post1", "0.0.1"):
        installed[name] = same
        assert machine.newer_than_tested() == []
    for here in (f"{tested}.1", "99.0+cpu", "99.1.dev0"):
        installed[name] = here
        row = the(machine.newer_than_tested())
        assert (row.check, row.status) == (f"package {name}", Status.warning)
        assert row.found == f"{here} is newer than {tested}, the newest version that syncbn was tested with"
        assert f"pip install '{name}=={tested}'" in row.fix


def test_a_package_that_is_not_installed_is_not_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", gone)
    assert machine.newer_than_tested() == []


def test_a_package_that_is_not_installed_has_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "requires", gone)
    monkeypatch.setattr(machine, "metadata", gone)
    assert the(machine.packages()).status == Status.warning
    assert the(machine.python()).status == Status.ok


@pytest.mark.parametrize(
    ("error", "found", "fix"),
    [
        ("operator torchvision::nms does not exist", r"torchvision 0\.28\.0 does not go with torch", "uninstall"),
        ("something else", r"RuntimeError: something else", "pip install"),
    ],
)
def test_a_broken_torchvision_is_one_row(tmp_path: Path, error: str, found: str, fix: str) -> None:
    package = tmp_path / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise RuntimeError({error!r})", encoding="utf-8")
    about = tmp_path / "torchvision-0.28.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n", encoding="utf-8")
    code = "from syncbn.doctor.machine import imports; (row,) = imports(); print(row.status, row.found, row.fix)"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, encoding="utf-8"
    )
    assert re.match(rf"FAILED {found}.* .*{fix}", done.stdout), done.stdout


def test_the_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert the(machine.processors()).found == "2 cores for this process, of 64"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert the(machine.processors()).status == Status.warning


def test_gpus_and_what_carries_their_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="A", total_memory=80e9)] * 3 + [SimpleNamespace(name="B", total_memory=24e9)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    assert the(machine.gpus()).found == "3 x A, 80 GB; 1 x B, 24 GB"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert the(machine.backends()).status == Status.warning
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert the(machine.backends()).status == Status.ok
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert the(machine.backends()).status == Status.failed


def test_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "built", lambda: True)
    monkeypatch.setattr(cpu, "disabled", False)
    assert the(machine.passes()).status == Status.ok
    monkeypatch.setattr(cpu, "disabled", True)
    assert the(machine.passes()).fix == "unset SYNCBN_NATIVE"
    monkeypatch.setattr(cpu, "built", lambda: False)
    assert "C compiler" in the(machine.passes()).fix


def test_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.kernels() == []  # where there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "why_not", lambda: "")
    assert the(machine.kernels()).status == Status.ok
    monkeypatch.setattr(gpu, "why_not", lambda: "there is no Triton")
    assert "there is no Triton" in the(machine.kernels()).found
    assert "C compiler" in the(machine.kernels()).fix


def test_few_open_files_and_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits, status in (((256, 256), Status.warning), ((1024, 4096), Status.ok), ((-1, -1), Status.ok)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
        assert the(machine.open_files()).status == status
    assert the(machine.shared_memory(tmp_path, least=1)).status == Status.ok
    assert "num_workers" in the(machine.shared_memory(tmp_path, least=1e30)).fix
    assert the(machine.shared_memory(tmp_path / "none")).status == Status.ok


def test_the_disk_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert the(machine.disk(tmp_path / "a" / "b", slow=100)).status == Status.ok
    assert "will be slow" in the(machine.disk(tmp_path, slow=0)).fix
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    assert the(machine.disk(tmp_path)).status == Status.warning
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    machine.disk(tmp_path)
    assert len(synced) == 1

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    row = the(machine.disk(tmp_path))
    assert row.status == Status.failed
    assert "(No space left on device)" in row.found
    assert not list(tmp_path.iterdir())


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "status", "found", "fix"),
    [
        ({}, "ok", "none: python train.py starts the ranks", ""),
        ({"MASTER_ADDR": "host", "MASTER_PORT": "29500"}, "ok", "none: .*", ""),
        (TORCHRUN, "ok", "torchrun: this is rank 3 of 4, 2 of them on this node", ""),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "warning", "RANK=0 .* not by torchrun", "unset them.*"),
        ({"WORLD_SIZE": "2"}, "FAILED", "WORLD_SIZE=2 without RANK", "unset WORLD_SIZE, .*"),
        ({"RANK": "1"}, "FAILED", "RANK=1 without WORLD_SIZE", "unset RANK, .*"),
        ({"LOCAL_RANK": "1"}, "FAILED", "LOCAL_RANK=1 without RANK, WORLD_SIZE", "unset LOCAL_RANK, .*"),
        ({"TORCHELASTIC_RUN_ID": "1"}, "FAILED", "TORCHELASTIC_RUN_ID=1 without RANK, WORLD_SIZE, .*", "unset .*"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "FAILED", "RANK=2 is not below WORLD_SIZE=2", "unset both.*"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "FAILED", "WORLD_SIZE=two is not a number", "unset WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "FAILED", "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2", ".*torchrun.*"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "FAILED", "LOCAL_WORLD_SIZE=8 is more than WORLD_SIZE=4", ".*"),
        (
            {"SLURM_NTASKS": "4"},
            "warning",
            "SLURM_NTASKS=4 is set, but this is not a Slurm job .*",
            "unset SLURM_NTASKS.*",
        ),
        ({"SLURM_JOB_ID": "7"}, "ok", "in Slurm job 7, but not started by srun: python train.py .* this node .*", ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, "ok", "in Slurm job 7, .*", ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, "warning", ".*not started by srun: SLURM_NTASKS=4.*", "srun .*"),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "2",
                "SLURM_JOB_NUM_NODES": "2",
            },
            "ok",
            "srun: this is task 2 of 4, 2 nodes, job 7",
            "",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "5"},
            "FAILED",
            "SLURM_PROCID=5 is not below SLURM_NTASKS=2",
            ".*srun.*",
        ),
    ],
)
def test_launchers(env: dict[str, str], status: str, found: str, fix: str) -> None:
    row = the(cluster.launcher(env))
    assert row.status == status
    assert re.fullmatch(found, row.found), row.found
    assert re.fullmatch(fix, row.fix), row.fix


UP = "n1|short*|idle\nn2|short*|mix-\nn2|long|mix-\nn3|long|down*\nn4|long|idle*\nn5|long|drain"


@pytest.mark.parametrize(
    ("sinfo", "status", "found"),
    [
        (f"printf '{UP}'", "ok", r"slurm 22\.05: 2 of 5 nodes up; partitions short, long"),
        ("printf 'n1|short*|down*'", "warning", r"slurm 22\.05: 0 of 1 nodes up; partitions short"),
        (
            "echo 'slurm_load: connect failure' >&2; exit 1",
            "warning",
            "sinfo does not answer: slurm_load: connect failure",
        ),
        ("exec sleep 60", "warning", r"sinfo does not answer: .* timed out after 3 seconds"),
        (None, "warning", "sbatch, scontrol, but no sinfo"),
    ],
)
def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinfo: str | None, status: str, found: str) -> None:
    scripts = {"sbatch": "exit 0", "scontrol": "exit 0"}
    if sinfo is not None:
        scripts["sinfo"] = f'if [ "$1" = --version ]; then echo slurm 22.05; exit; fi\n{sinfo}'
    monkeypatch.setenv("PATH", str(tmp_path))
    assert the(cluster.slurm()).found == "not installed"
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    row = the(cluster.slurm(limit=3))
    assert row.status == status
    assert re.fullmatch(found, row.found), row.found


@pytest.fixture
def wandb_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of W&B's in the environment, and a server that is not there; what it returns is the configuration."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return tmp_path / "wandb.yaml"


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as here:  # answers: 501
        thread = threading.Thread(target=here.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{here.server_port}"
        here.shutdown()
        thread.join()


def test_wandb_is_offline_unless_told(wandb_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_request", lambda *_: pytest.fail("offline, no server is asked"))
    assert the(cluster.wandb(wandb_here)).found == "mode offline (the default); no API key"
    wandb_here.write_text("mode: disabled", encoding="utf-8")
    assert the(cluster.wandb(wandb_here)).found.startswith(f"mode disabled ({wandb_here})")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    row = the(cluster.wandb(wandb_here))
    assert "an API key is in WANDB_API_KEY" in row.found
    assert KEY not in str(row)


def test_wandb_online(wandb_here: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    wandb_here.write_text("mode: online", encoding="utf-8")
    row = the(cluster.wandb(wandb_here))
    assert row.status == Status.failed
    assert row.fix.startswith("wandb login")
    (wandb_here.parent / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n", encoding="utf-8")
    start = time.monotonic()
    row = the(cluster.wandb(wandb_here, limit=2))
    assert time.monotonic() - start < 20
    assert row.status == Status.failed
    assert re.search(r"API key is in .*netrc; http://127\.0\.0\.1:9 does not answer", row.found)
    assert KEY not in str(row)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    row = the(cluster.wandb(wandb_here))
    assert row.status == Status.ok
    assert row.found.endswith(f"{server} answers")


def test_wandb_mode_in_the_environment_does_not_count(
    wandb_here: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert the(cluster.wandb(wandb_here)).status == Status.warning
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert "does not answer" in the(cluster.wandb(wandb_here)).found
    monkeypatch.setenv("WANDB_BASE_URL", server)
    row = the(cluster.wandb(wandb_here))
    assert (row.status, row.fix) == (Status.warning, "python train.py logger.mode=online")
