"""A setting that cannot work ends the run with one line that names it and what would work."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from omegaconf.errors import ReadonlyConfigError

from syncbn.training.config.machine import Launched, Machine
from syncbn.training.config.plan import Plan
from syncbn.training.config.run_id import RUN_ID
from syncbn.training.config.settle import settle
from tests.support.refuses import ANY, refuses
from tests.training.support.settled_config import composed, settled
from tests.training.support.train_command import train

# Settings, and what the error has to hold: the setting, its value, and words of the hint.
BAD: dict[str, tuple[Any, ...]] = {
    "data.batch_size=0": ("data.batch_size", 0, "use a whole number, 1 or more"),
    "data.batch_size=-4": ("data.batch_size", -4, "use a whole number, 1 or more"),
    "data.batch_size=true": ("data.batch_size", True, "use a whole number, 1 or more"),
    "data.batch_size=2.5": ("data.batch_size", 2.5, "use a whole number, 1 or more"),
    "data.global_batch_size=65": ("data.global_batch_size", 65, "multiple of 2, such as 64 or 66"),
    "data.batch_size=8 data.global_batch_size=32": ("data.batch_size", 8, "global_batch_size=32", "make 16", "one of"),
    "trainer.devices=100": ("trainer.devices", 100, "100 processes on 2 CPU cores; use at most 8"),
    "trainer.devices=0": ("trainer.devices", 0, "use a whole number, 1 or more"),
    "trainer.devices=some": ("trainer.devices", "some", "use a whole number, 1 or more, or auto"),
    "cluster=slurm": (
        "cluster",
        "slurm",
        "srun did not start this process",
        "sbatch slurm/train.sbatch, or cluster=local",
    ),
    "trainer.accelerator=tpu": ("trainer.accelerator", "tpu", "use auto, cpu or gpu"),
    "trainer.accelerator=gpu": (
        "trainer.accelerator",
        "gpu",
        "torch sees no GPU",
        "use trainer.accelerator=cpu (or auto)",
    ),
    "+trainer.sync_batchnorm=true": ("trainer.sync_batchnorm", True, "drop it; norm=sync"),
    "+trainer.overfit_batches=2": ("trainer.overfit_batches", 2, "use debug=overfit trainer.limit_train_batches=2"),
    "+trainer.overfit_batches=0.1": ("trainer.overfit_batches", 0.1, "debug=overfit trainer.limit_train_batches=0.1"),
    "norm.group=3": ("norm.group", 3, "does not divide the world size 2; sizes that do: [1, 2]"),
    "norm.group=everyone": ("norm.group", "everyone", 'is not known; use "world", "node",'),
    "norm.batch_size=48": ("norm.batch_size", 48, "32 on each of 2 devices; sizes that work: 1, 2, 4, 8, 16, 32, 64"),
    "norm.batch_size=64 norm.group=1": ("norm.batch_size", 64, "it sets group and ghost_batch: leave these out"),
    "precise_batches=-1": ("precise_batches", -1, "use a whole number, 0 (not at all) or more"),
    "precise_batches=9 norm=none": ("precise_batches", 9, "norm=none leaves no batch norm", "use norm=sync or local"),
    "precise_batches=9 test=false": ("precise_batches", 9, "test=false leaves no test to repeat; use test=true"),
    "norm=ghost norm.batch_size=12": ("norm.batch_size", 12, "the 32 samples", "sizes that work: 1, 2, 4, 8, 16"),
    "norm=ghost norm.batch_size=32": ("norm.batch_size", 32, "the 32 samples", "sizes that work: 1, 2, 4, 8, 16"),
    "norm=ghost norm.batch_size=0": ("norm.batch_size", 0, "use a whole number, 1 or more"),
    "norm=ghost data.batch_size=1": ("norm.batch_size", 16, "holds 1 sample", "larger data.batch_size, or norm=local"),
    "norm=torch_sync": ("norm", "torch_sync", "torch.nn.SyncBatchNorm does not run on the CPU; use norm=sync"),
    "norm.name=batch": ("norm.name", "batch", "use one of sync, local, local_mean, ghost, none, group_norm, torch_"),
    "optimizer.lr=fast": ("optimizer.lr", "fast", "use a number, 0 or more"),
    "optimizer.lr=nan": ("optimizer.lr", ANY, "use a number, 0 or more"),
    "optimizer.weight_decay=-0.1": ("optimizer.weight_decay", -0.1, "use a number, 0 or more"),
    "trainer.max_epochs=0": ("trainer.max_epochs", 0, "use a whole number, 1 or more"),
    "trainer.max_epochs=-2": ("trainer.max_epochs", -2, "use a whole number, 1 or more"),
    "seed=-1": ("seed", -1, "use a number from 0 to 4294967295"),
    "seed=4294967296": ("seed", 2**32, "use a number from 0 to 4294967295"),
    "simulate=0": ("simulate", 0, "use a whole number, 1 or more"),
    "target=0": ("target", 0, "above 0 and at most 1"),
    "mode=tset": ("mode", "tset", "use train, test or find_lr"),
    "ckpt_path=a ckpt_restore=most": ("ckpt_restore", "most", "use all, weights or null"),
    "ckpt_restore=all": ("ckpt_restore", "all", "there is nothing to restore; set ckpt_path too"),
    "resume.every_n_steps=0": ("resume.every_n_steps", 0, "use a whole number, 1 or more"),
    "resume.every_n_minutes=0": ("resume.every_n_minutes", 0.0, "use a number above 0"),
    "resume.keep=0": ("resume.keep", 0, "use a whole number, 1 or more"),
    "timeouts.collective=1e300": ("timeouts.collective", 1e300, "up to 2000000, in seconds"),
    "timeouts.stop=inf": ("timeouts.stop", float("inf"), "up to 2000000, in seconds"),
    "timeouts.stop=0": ("timeouts.stop", 0.0, "use a number above 0"),
    "ddp.bucket_cap_mb=1e300": ("ddp.bucket_cap_mb", 1e300, "use a number above 0 and up to 1000000, in MiB, or null"),
    "~norm.group": ("norm.group", None, "norm.name=sync needs it, and it is missing"),
    "norm=group_norm ~norm.num_groups": ("norm.num_groups", None, "norm.name=group_norm needs it, and it is missing"),
    "+trainer.max_steps=${nothing}": ("trainer.max_steps", None, "Interpolation key 'nothing' not found"),
}


@pytest.mark.parametrize("settings", BAD)
def test_a_setting_that_cannot_work_is_refused_with_what_would(settings: str) -> None:
    setting, value, *words = BAD[settings]
    with refuses(setting, value, *words):
        settled(*settings.split(), machine=Machine(gpus=0, cores=2))


# These end the program after it has begun: the launcher, or the ranks, which alone know the data and the model.
LATER = {
    "trainer.num_nodes=2": r"trainer\.num_nodes=2: .* torchrun --nnodes=2 --nproc-per-node=2 .*",
    "ckpt_path=nowhere.ckpt": r"ckpt_path=nowhere\.ckpt: there is no such file; .*",
    "norm=ghost norm.only=bn9": r"norm\.only=\['bn9'\]: no batch norm layer .* there are network\.stem\.1, .*",
    "data.batch_size=700": r"data\.batch_size=700: a global batch is 1400 samples .* has 1167; use at most 583",
    "data.val_fraction=0.9": r"data\.val_fraction=0\.9 and data\.test_fraction=0\.2: .* below 1",
    'norm.only="*bn99*"': r"norm\.only=\['\*bn99\*'\]: no batch norm layer .* there are network\.stem\.1, .*",
    "norm.group=3": r"norm\.group=3: does not divide the world size 2; sizes that do: \[1, 2\]",
}


@pytest.mark.parametrize("settings", LATER)
def test_one_line_names_the_setting_and_what_would_work(tmp_path: Path, settings: str) -> None:
    run = train(tmp_path, *settings.split()).ended(1)
    assert re.fullmatch(f"error: {LATER[settings]}\n", run.err), run.err


def test_settling_leaves_the_settings_as_they_were() -> None:
    cfg = composed("norm=ghost", "norm.only=bn1")
    before = cfg.copy()
    plan = settle(cfg, Machine(gpus=0, cores=2), Path("a"))
    assert cfg == before
    assert (plan.cfg.norm.only, plan.cfg.data.global_batch_size) == (["bn1"], 64)
    with pytest.raises(ReadonlyConfigError):
        plan.cfg.seed = 1
    assert plan.starting_from("a.ckpt", "all").checkpoint == "a.ckpt"
    assert plan.checkpoint is None


@pytest.mark.parametrize(
    ("settings", "numbers"),  # world size, replicas, batch size, global, loader, normalization batch
    [
        ([], (2, 2, 32, 64, 64, 64)),
        (["norm=local", "data.batch_size=8"], (2, 2, 8, 16, 16, 8)),
        (["norm.group=1", "data.global_batch_size=16"], (2, 2, 8, 16, 16, 8)),
        (["norm=none"], (2, 2, 32, 64, 64, None)),
        (["norm=ghost", "norm.batch_size=8"], (2, 2, 32, 64, 64, 8)),
        (["norm.batch_size=16"], (2, 2, 32, 64, 64, 16)),
        (["simulate=8", "data.batch_size=4"], (1, 8, 4, 32, 32, 32)),
        (["simulate=4", "trainer.accumulate_grad_batches=2", "norm.group=2"], (1, 4, 32, 128, 256, 64)),
        (["trainer.devices=4", "norm.group=node", "trainer.accumulate_grad_batches=2"], (4, 4, 32, 128, 128, 128)),
    ],
)
def test_the_numbers_of_a_plan_follow_from_its_settings(settings: list[str], numbers: tuple[int | None, ...]) -> None:
    plan = settled(*settings, machine=Machine(gpus=0, cores=2))
    sizes = (plan.batch_size, plan.global_batch_size, plan.loader_batch_size)
    assert (plan.world_size, plan.replicas, *sizes, plan.normalization_batch) == numbers
    assert Plan.of(plan.cfg, plan.run_dir) == plan


@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_numbers_of_nodes_and_devices_are_the_launchers(by: str) -> None:
    machine = Machine(gpus=0, cores=8, launched=Launched(by, num_nodes=2, devices=3))
    plan = settled(machine=machine)
    assert (plan.devices, plan.num_nodes, plan.global_batch_size) == (3, 2, 192)
    with refuses("trainer.devices", 2, f"{by} started 3; leave it out, or "):
        settled("trainer.devices=2", machine=machine)
    with refuses("trainer.num_nodes", 4, f"{by} started 2; leave it out, or "):
        settled("trainer.num_nodes=4", machine=machine)


def test_slurm_with_fewer_tasks_than_gpus_is_refused_with_the_header() -> None:
    machine = Machine(gpus=8, cores=8, launched=Launched("srun", num_nodes=2, devices=1))
    with refuses("Slurm", None, "8 GPUs, but 1 tasks", "#SBATCH --ntasks-per-node=8", "trainer.devices=1"):
        settled(machine=machine)
    assert settled("trainer.devices=1", machine=machine).devices == 1


@pytest.mark.parametrize("none", ["0", "0.0"])
def test_no_batches_to_overfit_on_are_none(none: str) -> None:
    settled(f"+trainer.overfit_batches={none}")


@pytest.mark.parametrize("setting", ["run.id=a:b", "run.id=a/b", "run.id=.", "run.id='[a]'", "run.id='a '"])
def test_names_that_a_directory_or_wandb_refuses_are_refused(setting: str) -> None:
    with refuses("run.id", setting.removeprefix("run.id=").strip("'"), "use letters, digits, any of -_.+@, and blanks"):
        settled(setting)


def test_what_a_run_may_be_called() -> None:
    for good in ("mine", "20260131-235959-3f9c", "a b", "Müller", "lr+0.1@x", "7", "_a", "a-", "日本"):
        assert re.fullmatch(RUN_ID, good)
        assert wandb.Settings(run_id=good).run_id == good
    for bad in ("", " a", "a ", "..", "-a", "a\n", "a\tb", *(f"a{sign}b" for sign in ":;,#?/'\"\\%=()[]{}*$&|<>!~^`")):
        assert not re.fullmatch(RUN_ID, bad), bad


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the wheel for CUDA beside torch for the CPU, which says this when it is imported."""
    package = tmp_path / "packages/torchvision"
    package.mkdir(parents=True)
    raises = "raise RuntimeError('operator torchvision::nms does not exist')"
    (package / "__init__.py").write_text(raises, encoding="utf-8")
    about = package.with_name("torchvision-0.28.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    run = train(tmp_path, fresh=True).ended(1)
    found = rf"torchvision 0\.28\.0 does not go with torch {re.escape(torch.__version__)}"
    assert re.fullmatch(rf"error: {found}, .* \(operator .*\): .* \(pip uninstall torchvision\)\n", run.err), run.err


@pytest.mark.parametrize(
    ("setting", "hint"),
    [("norm=batch", "local_mean"), ("norm.grop=2", "grop"), ("seed=one", "seed"), ("logger.mode=loud", "offline")],
)
def test_hydra_refuses_unknown_choices_keys_and_types(tmp_path: Path, setting: str, hint: str) -> None:
    run = train(tmp_path, setting).ended(1)
    assert hint in run.err
    assert "Traceback" not in run.err


def test_online_without_a_key_is_refused_also_where_there_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = train(tmp_path, "logger.mode=online", timeout=120).ended(1)
    line = r"error: logger\.mode=online: W&B says: No API key .*; use logger\.mode=offline\n"
    assert re.fullmatch(line, run.err), run.err


@pytest.mark.parametrize(("asked", "given"), [("auto", 4), (3, 3), (5, None)])
def test_no_more_gpus_than_there_are(asked: object, given: int | None) -> None:
    settings, machine = f"trainer.devices={asked}", Machine(gpus=4, cores=2)
    if given is None:
        with refuses("trainer.devices", 5, "there are 4 GPUs; use at most 4"):
            settled(settings, machine=machine)
    else:
        plan = settled(settings, machine=machine)
        assert (plan.accelerator, plan.devices, plan.num_nodes) == ("gpu", given, 1)


def test_torchs_layer_wants_real_devices() -> None:
    machine = Machine(gpus=4, cores=2, launched=Launched("torchrun", num_nodes=2, devices=4))
    assert settled("norm=torch_sync", "data.batch_size=8", machine=machine).normalization_batch == 64
    with refuses("simulate", 4, "torch.nn.SyncBatchNorm wants real devices; use norm=sync"):
        settled("norm=torch_sync", "simulate=4", machine=Machine(gpus=4, cores=2))


def test_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    run = train(tmp_path, "data.batch_size=0", full_error=True).ended(1)
    assert "Traceback" in run.err
    assert "SettingError: data.batch_size=0" in run.err
