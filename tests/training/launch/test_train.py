"""The main job through its command line, as a user calls it."""

import csv
import gzip
import json
import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.warm_process import WarmProcess
from tests.training.support import screen, wandb_log
from tests.training.support.train_command import PROJECT, REPO, Run, environment, train

QUICK = ("trainer.max_epochs=2", "model=mlp")


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("default"))


def test_the_default_run_reaches_97_percent(default_run: Run) -> None:
    assert default_run.code == 0, default_run.err
    test = default_run.json("result")["test"]
    assert test["test/acc"] >= 0.97
    assert test["test/count"] == 360


def test_it_ends_with_a_table_and_the_command_that_uploads(default_run: Run) -> None:
    for words in ("test accuracy", "test loss", "images/s", "run directory", "best checkpoint", "W&B run"):
        assert words in default_run.out
    upload = default_run.out.splitlines()[-1]
    assert "wandb sync outputs/" in upload
    assert (default_run.directory.parents[1] / upload.split()[-1]).is_dir()


def test_without_a_terminal_there_is_a_plain_line_an_epoch_and_nothing_else(default_run: Run) -> None:
    epochs = [line for line in default_run.out.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 15
    assert "\r" not in default_run.out
    assert "\x1b" not in default_run.out
    assert default_run.err == ""


def test_train_log_holds_what_was_printed(default_run: Run) -> None:
    assert default_run.directory is not None
    heading, *rest = (default_run.directory / "train.log").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"--- [\d-]+ [\d:]+\+00:00, attempt 1: python \S*train.py", heading)
    assert rest == [line.rstrip() for line in default_run.out.splitlines()]
    model = "model: 77,754 parameters (all train), 1.53 MFLOPs per sample; "
    assert rest[1] == f"{model}9 batch norm layers: all synchronized over world (2 processes)"
    assert re.fullmatch(r"epoch  1/15  step 18  train/acc .* val/loss \S+  [\d,]+ images/s  \d+:\d\d left", rest[2])
    assert " left" not in rest[16]  # of the last epoch


def test_what_is_for_rank_0_to_say_is_said_once(tmp_path: Path) -> None:
    run = train(tmp_path, *QUICK, "logger=csv", "+callbacks.speak={_target_: mine.Speak}").ended()
    others = (run.directory / "ranks" / "1.log").read_text(encoding="utf-8")
    log = (run.directory / "train.log").read_text(encoding="utf-8")
    for word in ("a word by Lightning", "a word by torchmetrics"):
        assert f"UserWarning: {word}\n" in run.err
        assert f"UserWarning: {word}\n" in log
        assert word not in others


def test_the_run_directory_tells_the_whole_story(default_run: Run) -> None:
    about = default_run.json("run")
    assert about["status"] == "finished"
    assert about["world_size"] == 2
    assert about["normalization_batch"] == 64
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert about["git"] is None  # the working directory is in no repository
    names = {p.name for p in default_run.directory.iterdir()}
    assert {"config.yaml", "run.json", "metrics.csv", "checkpoints", "wandb", "result.json"} <= names
    with (default_run.directory / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for column in ("train/loss_step", "train/loss", "val/loss", "val/acc", "test/acc", "lr-SGD/pg1"):
        assert any(row.get(column) for row in rows), column


def test_checkpoints_load_as_plain_data(default_run: Run) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(default_run.directory / "checkpoints" / name, weights_only=True)
        assert "network.stem.1.running_mean" in checkpoint["state_dict"]


def test_there_is_one_offline_wandb_run_with_config_and_metrics(default_run: Run) -> None:
    runs = list((default_run.directory / "wandb").glob("*run-*"))
    assert len([r for r in runs if not r.is_symlink()]) == 1
    read = wandb_log.summary(runs[0])
    assert read["config"]["norm"].items() >= {"name": "sync", "group": "world", "only": None}.items()
    assert read["config"]["data"]["global_batch_size"] == 64
    assert read["exit_code"] == 0
    assert read["summary"]["test/acc"] == pytest.approx(default_run.json("result")["test"]["test/acc"])
    assert read["summary"]["images_per_second"] > 0
    assert set(read["tags"]) == {"sync", "world_size=2", "normalization_batch=64"}


@pytest.mark.parametrize("norm", ["local", "local_mean"])
def test_per_device_statistics_become_rank_0s_or_are_pooled(tmp_path: Path, norm: str) -> None:
    first, second = seen(tmp_path, f"norm={norm}")
    assert not list(tmp_path.glob("outputs/*/wandb"))
    assert len(first["train"]) == 4
    for name, (kind, _, at_the_end) in first["train"].items():
        assert kind == "BatchNorm1d"
        assert second["train"][name][2] == at_the_end
        ranks = [rank["batch"][name][2] for rank in (first, second)]  # sums of running means after the last batch
        assert abs(ranks[0] - ranks[1]) > 1e-4
        expected = ranks[0] if norm == "local" else sum(ranks) / 2
        assert at_the_end == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("norm", "kind"), [("none", "Identity"), ("group_norm", "GroupNorm")])
def test_norms_without_a_batch_take_batch_norm_out(tmp_path: Path, norm: str, kind: str) -> None:
    first, _ = seen(tmp_path, f"norm={norm}")
    assert first["train"] == {}
    assert kind in first["kinds"]


def test_a_group_of_one_shares_with_nobody(tmp_path: Path) -> None:
    first, second = seen(tmp_path, "norm.group=1")
    assert {kind for kind, *_ in first["batch"].values()} == {"SyncBatchNorm1d"}
    assert first["batch"] != second["batch"]


def test_two_devices_follow_one_with_the_same_global_batch(tmp_path: Path) -> None:
    weights = {}
    same = ("data.global_batch_size=32", "trainer.precision=64-true", "logger=csv", "test=false", *QUICK)
    for name, more in {
        "one": ("trainer.devices=1", "norm=local"),
        "sync": ("trainer.devices=2", "norm=sync"),
        "local": ("trainer.devices=2", "norm=local"),
    }.items():
        run = train(tmp_path, *same, *probe(tmp_path, name), *more).ended()
        weights[name] = torch.load(f"{tmp_path / name}.0.pt")
        assert run.json("result")["steps"] == 72
    for key, value in weights["one"].items():
        torch.testing.assert_close(weights["sync"][key], value, rtol=0, atol=1e-9)
    assert not torch.allclose(weights["local"]["network.head.weight"], weights["one"]["network.head.weight"], atol=1e-4)


def test_layers_are_synchronized_while_they_train_and_are_given_back(tmp_path: Path) -> None:
    frozen = "network.body.1"
    ranks = seen(tmp_path, freeze=frozen)
    for rank in ranks:
        for name in rank["train"]:
            trains = name != frozen
            assert rank["train"][name][:2] == ["SyncBatchNorm1d", trains]
            assert rank["setup_fit"][name][:2] == ["BatchNorm1d", trains]
            assert rank["teardown_fit"][name][:2] == ["BatchNorm1d", trains]
        assert rank["train"][frozen][2] == 0.0  # frozen statistics do not move
        assert rank["train"]["network.body.4"][2] != 0.0
    assert ranks[0]["batch"] == ranks[1]["batch"]
    assert ranks[0]["train"] == ranks[1]["train"]


def test_norm_only_chooses_layers(tmp_path: Path) -> None:
    first, _ = seen(tmp_path, 'norm.only="*body.1"', "norm.group=2")
    assert {name: kind for name, (kind, *_) in first["train"].items()} == {
        "network.body.1": "SyncBatchNorm1d",
        "network.body.4": "BatchNorm1d",
        "network.body.7": "BatchNorm1d",
        "network.body.10": "BatchNorm1d",
    }


def test_a_users_own_module_and_data_come_in_by_target(tmp_path: Path) -> None:
    run = train(tmp_path, "--config-dir", f"{PROJECT}/conf", "module=mine", "data=mine", "trainer.max_epochs=1").ended()
    assert re.search(r"^  mine +42$", run.out, re.MULTILINE)  # in the table, as any metric of the test
    assert "model: 626 parameters (all train), 1.18 kFLOPs per sample; 1 batch norm layer: all synchron" in run.out
    assert run.json("result")["test"] == {"mine": 42.0}
    assert run.json("result")["steps"] == 4  # 96 samples, 2 x 12 a step


def test_a_users_own_network_comes_in_by_target(tmp_path: Path) -> None:
    run = train(tmp_path, "--config-dir", f"{PROJECT}/conf", "model=mine", "trainer.max_epochs=3", "logger=csv").ended()
    assert run.json("result")["test"]["test/acc"] > 0.5


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Four epochs, and two and two, end bitwise alike: weights, momentum, statistics; so order and lr were."""
    four = ("model=mlp", "trainer.max_epochs=4", "scheduler.epochs=4")
    straight = train(tmp_path, *four, "logger=csv").ended()
    (tmp_path / "parts").mkdir()
    first = train(tmp_path / "parts", *four, "trainer.max_epochs=2").ended()
    last = first.directory / "checkpoints" / "last.ckpt"  # type: ignore[operator]
    second = train(tmp_path / "parts", *four, f"ckpt_path={last}").ended()

    assert second.directory == first.directory
    lines = [line for line in second.out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["3/4", "4/4"]
    written = (second.directory / "train.log").read_text(encoding="utf-8").splitlines()  # type: ignore[operator]
    kinds = [
        line.split()[0] if line.startswith("---") else line.split()[1] for line in written if line[:3] in ("---", "epo")
    ]
    assert kinds == ["---", "1/2", "2/2", "---", "3/4", "4/4"]
    states = [
        torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[operator]
        for run in (straight, second)
    ]
    assert states[0]["global_step"] == states[1]["global_step"] == 4 * 18
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    momenta = [[p["momentum_buffer"] for p in s["optimizer_states"][0]["state"].values()] for s in states]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))

    runs = [p for p in (second.directory / "wandb").glob("offline-run-*") if not p.is_symlink()]  # type: ignore[operator]
    assert len(runs) == 2
    assert len({p.name.split("-", 3)[-1] for p in runs}) == 1  # one W&B run, two stretches of it
    assert all(str(p.relative_to(tmp_path / "parts")) in second.out for p in runs)
    assert second.json("run-1")["overrides"] == [*four, "trainer.max_epochs=2"]  # nothing of the first stretch is lost

    files = second.directory.glob("*.[jcy]*")  # type: ignore[union-attr]  # .json, .csv, .yaml
    before = {path: path.read_bytes() for path in files}
    assert len(before) >= 9
    again = train(tmp_path / "parts", *four, f"ckpt_path={last}").ended()
    assert f"run {second.directory.name} has finished before" in again.out  # type: ignore[union-attr]
    assert all(path.read_bytes() == contents for path, contents in before.items())


def test_more_epochs_than_planned_follow_the_longer_schedule(tmp_path: Path) -> None:
    first = train(tmp_path, *QUICK, "logger=csv")
    last = first.directory / "checkpoints" / "last.ckpt"  # type: ignore[operator]
    second = train(
        tmp_path, "model=mlp", "trainer.max_epochs=4", f"ckpt_path={last}", "trainer.log_every_n_steps=1", "logger=csv"
    ).ended()
    with (second.directory / "metrics.csv").open(encoding="utf-8") as file:  # type: ignore[operator]
        rows = [row for row in csv.DictReader(file) if int(row["step"]) >= 2 * 18]
    rates = [float(row["lr-SGD/pg1"]) for row in rows if row["lr-SGD/pg1"]]
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (2, 3)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(18)])


def test_without_the_wandb_server_training_goes_on_and_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = train(tmp_path, *QUICK, "logger.mode=online", "logger.init_timeout=3").ended()
    assert re.fullmatch(r"W&B cannot be reached \(.*127\.0\.0\.1:9.*\): the run is kept offline; .*\n", run.err), (
        run.err
    )
    assert run.json("result")["test"]["test/count"] == 360
    assert run.json("wandb").items() >= {"mode": "offline", "asked": "online", "url": None}.items()
    upload = run.out.splitlines()[-1]
    assert "wandb sync outputs/" in upload
    assert wandb_log.summary(tmp_path / upload.split()[-1])["summary"]["test/count"] == 360


def test_torchrun_makes_one_run_of_its_ranks_and_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    """The bar asks rank 0 alone for metrics, which is a message; local_mean has messages of its own just then."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = train(tmp_path, *QUICK, "norm=local_mean", "logger=csv", launcher=torchrun, terminal=True)
    assert run.code == 0, run.out
    epochs = [line for line in screen.lines(run.out, width=1000) if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert all("train acc 0." in line and "val acc 0." in line for line in epochs)
    assert "\x1b[2K" in run.out  # there was a bar
    assert run.directory is not None
    written = (run.directory / "train.log").read_text(encoding="utf-8")
    assert "\x1b" not in written
    assert [line[:18] for line in written.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2  step 18",
        "epoch 2/2  step 36",
    ]
    assert "test accuracy" in run.out
    assert len(list(tmp_path.glob("outputs/*"))) == 1
    assert run.json("run")["world_size"] == 2
    assert run.json("run")["status"] == "finished"


@pytest.mark.parametrize(
    "settings",
    ["debug=fast", "debug=overfit", "debug=profile", "optimizer=adamw scheduler=constant trainer.max_epochs=1"],
)
def test_the_other_files_in_conf_run(tmp_path: Path, settings: str) -> None:
    run = train(tmp_path, *settings.split(), "model=mlp", "logger=csv").ended()
    if settings == "debug=overfit":
        assert " train/acc 1.0000 " in run.out
    if settings == "debug=profile":
        assert "all-reduces of the batch norm layers" in run.out
        for rank in (0, 1):
            with gzip.open(run.directory / f"trace-{rank}.json.gz", "rt", encoding="utf-8") as file:  # type: ignore[operator]
                events = [str(event.get("name")) for event in json.load(file)["traceEvents"]]
            assert len({name for name in events if name.startswith("ProfilerStep#")}) == 4
            assert any(name.startswith("syncbn::allreduce") for name in events)
            assert any("optimizer_step" in name for name in events)
            table = (run.directory / f"profile-{rank}.txt").read_text(encoding="utf-8")  # type: ignore[operator]
            assert table.startswith("profile of 4 training steps")
            assert (table in run.out) == (rank == 0)


def test_the_tested_count_is_the_data_sets_on_two_devices(tmp_path: Path) -> None:
    run = train(
        tmp_path, "data.test_fraction=0.2008", *QUICK, "logger=csv"
    ).ended()  # an odd number, which no even share makes
    assert run.json("result")["test"]["test/count"] == 361


def test_torchrun_on_two_nodes_is_one_run_too(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=both"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--local-addr=localhost"]
    command = [*torchrun, str(REPO / "train.py"), *QUICK, "norm.group=node"]
    nodes = [
        WarmProcess(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    out = [node.communicate(timeout=120)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], out
    (directory,) = tmp_path.glob("outputs/*")
    about = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    assert about["world_size"] == 2
    assert about["status"] == "finished"
    assert "test accuracy" in "".join(out)
    assert about["normalization_batch"] == 32  # each node by itself
    assert len([p for p in (directory / "wandb").glob("offline-run-*") if not p.is_symlink()]) == 1


def probe(where: Path, name: str = "seen", freeze: str = "null") -> list[str]:
    return [f"+callbacks.probe={{_target_: mine.Probe, path: {where / name}, freeze: {freeze}}}"]


def seen(where: Path, *settings: str, freeze: str = "null") -> list[dict]:
    """What the probe wrote down on each rank of a run with these settings."""
    train(where, *settings, *QUICK, *probe(where, freeze=freeze), "logger=csv").ended()
    return [json.loads((where / f"seen.{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
