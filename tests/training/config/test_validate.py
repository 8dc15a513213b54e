"""A setting that cannot work ends the run with one line that names it and what would work."""

import re
from pathlib import Path

import pytest
import torch
import wandb
from omegaconf import OmegaConf

from syncbn.training.config.derived import normalization_batch
from syncbn.training.config.validate import RUN_ID, _check_torch_sync, _check_trainer, _settle_devices
from syncbn.training.errors import SettingError
from tests.training.support.train_command import train

BAD = {
    "data.batch_size=0": r"data\.batch_size=0: use a whole number, 1 or more",
    "data.batch_size=-4": r"data\.batch_size=-4: use a whole number, 1 or more",
    "data.global_batch_size=65": r"data\.global_batch_size=65: .* multiple of 2, such as 64 or 66",
    "data.batch_size=8 data.global_batch_size=32": r"data\.batch_size=8 and .*_batch_size=32 disagree: .* make 16; .*",
    "trainer.devices=100": r"trainer\.devices=100: .* use at most \d+",
    "trainer.devices=0": r"trainer\.devices=0: use a whole number, 1 or more",
    "cluster=slurm": r"cluster=slurm: srun did not start this process; use sbatch slurm/train\.sbatch, or .*",
    "trainer.num_nodes=2": r"trainer\.num_nodes=2: .* torchrun --nnodes=2 --nproc-per-node=2 .*",
    "trainer.accelerator=tpu": r"trainer\.accelerator=tpu: use auto, cpu or gpu",
    "+trainer.sync_batchnorm=true": r"trainer\.sync_batchnorm=true: drop it; norm=sync .*",
    "+trainer.overfit_batches=2": r"trainer\.overfit_batches=2: use debug=overfit trainer\.limit_train_batches=2",
    "+trainer.overfit_batches=0.1": r"trainer\.overfit_batches=0\.1: use debug=overfit trainer\..*=0\.1",
    "norm.group=3": r"norm\.group=3 does not divide the world size 2; sizes that do: \[1, 2\]",
    "norm.group=everyone": r'norm\.group="everyone" is not known; use "world", "node", .*',
    "precise_batches=-1": r"precise_batches=-1: use a whole number, 0 \(not at all\) or more",
    "precise_batches=9 norm=none": r"precise_batches=9: norm=none leaves no batch norm to measure; use norm=sync or .*",
    "precise_batches=9 test=false": r"precise_batches=9: test=false leaves no test to repeat; use test=true",
    "norm=ghost norm.batch_size=12": r"norm\.batch_size=12: .* the 32 samples .*; sizes that work: 1, 2, 4, 8, 16",
    "norm=ghost norm.batch_size=32": r"norm\.batch_size=32: .* the 32 samples .*; sizes that work: 1, 2, 4, 8, 16",
    "norm=ghost data.batch_size=1": r"norm\.batch_size=16: a device holds 1 sample, .* data\.batch_size, or norm=local",
    "norm=torch_sync": r"norm=torch_sync: torch\.nn\.SyncBatchNorm does not run on the CPU; use norm=sync",
    "ckpt_path=nowhere.ckpt": r"ckpt_path=nowhere\.ckpt: there is no such file; .*",
    "optimizer.lr=fast": r"optimizer\.lr=fast: use a number, 0 or more",
    "trainer.max_epochs=0": r"trainer\.max_epochs=0: use a whole number, 1 or more",
    "timeouts.collective=1e300": r"timeouts\.collective=1e\+300: use at most 2000000 seconds",
    "timeouts.stop=inf": r"timeouts\.stop=inf: use at most 2000000 seconds",
    "ddp.bucket_cap_mb=1e300": r"ddp\.bucket_cap_mb=1e\+300: use a number above 0 and up to 1000000, in MiB, or null",
    "~norm.group": r"norm\.group: norm\.name=sync needs it, and it is missing",
    "norm=group_norm ~norm.num_groups": r"norm\.num_groups: norm\.name=group_norm needs it, and it is missing",
    # These are found by the ranks, which alone know the data and the model.
    "norm=ghost norm.only=bn9": r"norm\.only=\['bn9'\]: no batch norm layer .* there are network\.stem\.1, .*",
    "data.batch_size=700": r"data\.batch_size=700: a global batch is 1400 samples .* has 1167; use at most 583",
    "data.val_fraction=0.9": r"data\.val_fraction=0\.9 and data\.test_fraction=0\.2: .* below 1",
    'norm.only="*bn99*"': r"norm\.only=\['\*bn99\*'\]: no batch norm layer .* there are network\.stem\.1, .*",
}


@pytest.mark.parametrize("settings", BAD)
def test_one_line_names_the_setting_and_what_would_work(tmp_path: Path, settings: str) -> None:
    run = train(tmp_path, *settings.split())
    assert run.code == 1
    assert re.fullmatch(f"error: {BAD[settings]}\n", run.err), run.err


@pytest.mark.parametrize("none", [0, 0.0])
def test_no_batches_to_overfit_on_are_none(none: float) -> None:
    _check_trainer(OmegaConf.create({"overfit_batches": none}))


@pytest.mark.parametrize("setting", ["run.id=a:b", "run.id=a/b", "run.id=.", "run.id='[a]'", "run.id='a '"])
def test_names_that_a_directory_or_wandb_refuses_are_refused(tmp_path: Path, setting: str) -> None:
    run = train(tmp_path, setting)
    assert run.code == 1
    name = re.escape(setting.replace("'", ""))
    assert re.fullmatch(rf"error: {name}: use letters, digits, any of -_\.\+@, and blanks .* first\n", run.err), run.err


def test_what_a_run_may_be_called() -> None:
    for good in ("mine", "20260131-235959-3f9c", "a b", "Müller", "lr+0.1@x", "7", "_a", "a-", "日本"):
        assert re.fullmatch(RUN_ID, good)
        assert wandb.Settings(run_id=good).run_id == good
    for bad in ("", " a", "a ", "..", "-a", "a\n", "a\tb", *(f"a{sign}b" for sign in ":;,#?/'\"\\%=()[]{}*$&|<>!~^`")):
        assert not re.fullmatch(RUN_ID, bad), bad


def test_without_a_gpu_asking_for_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = train(tmp_path, "trainer.accelerator=gpu")
    assert run.code == 1
    assert run.err == "error: trainer.accelerator=gpu: torch sees no GPU here; use trainer.accelerator=cpu (or auto)\n"


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the wheel for CUDA beside torch for the CPU, which says this when it is imported."""
    package = tmp_path / "packages/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')", encoding="utf-8"
    )
    about = package.with_name("torchvision-0.28.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    run = train(tmp_path)
    assert run.code == 1
    found = rf"torchvision 0\.28\.0 does not go with torch {re.escape(torch.__version__)}"
    assert re.fullmatch(rf"error: {found}, .* \(operator .*\): .* \(pip uninstall torchvision\)\n", run.err), run.err


@pytest.mark.parametrize(
    ("setting", "hint"),
    [("norm=batch", "local_mean"), ("norm.grop=2", "grop"), ("seed=one", "seed"), ("logger.mode=loud", "offline")],
)
def test_hydra_refuses_unknown_choices_keys_and_types(tmp_path: Path, setting: str, hint: str) -> None:
    run = train(tmp_path, setting)
    assert run.code == 1
    assert hint in run.err
    assert "Traceback" not in run.err


def test_online_without_a_key_is_refused_also_where_there_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = train(tmp_path, "logger.mode=online", timeout=120)
    assert run.code == 1
    assert re.fullmatch(r"error: logger\.mode=online: W&B says: No API key .*; use logger\.mode=offline\n", run.err), (
        run.err
    )


@pytest.mark.parametrize(("asked", "given"), [("auto", 4), (3, 3), (5, None)])
def test_no_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch, asked: object, given: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    trainer = OmegaConf.create({"accelerator": "auto", "devices": asked, "num_nodes": "auto", "max_epochs": 1})
    if given is None:
        with pytest.raises(SettingError, match=r"trainer\.devices=5: there are 4 GPUs; use at most 4"):
            _settle_devices(trainer)
    else:
        _settle_devices(trainer)
        assert (trainer.accelerator, trainer.devices, trainer.num_nodes) == ("gpu", given, 1)


def test_torchs_layer_wants_real_devices() -> None:
    cfg = OmegaConf.create(
        {
            "norm": {"name": "torch_sync"},
            "trainer": {"accelerator": "gpu", "devices": 4, "num_nodes": 2},
            "data": {"batch_size": 8},
        }
    )
    _check_torch_sync(cfg)
    assert normalization_batch(cfg) == 64
    with pytest.raises(SettingError, match=r"simulate=4: torch\.nn\.SyncBatchNorm wants real devices; use norm=sync"):
        _check_torch_sync(OmegaConf.merge(cfg, {"simulate": 4}))


def test_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    run = train(tmp_path, "data.batch_size=0", full_error=True)
    assert run.code == 1
    assert "Traceback" in run.err
    assert "SettingError: data.batch_size=0" in run.err
