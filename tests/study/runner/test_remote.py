"""Tests runs that need another machine: the checks here, and the printed commands."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from syncbn.study.runner import remote
from syncbn.training.config.machine import Machine
from syncbn.training.config.plan import Plan
from syncbn.training.launch.run_pool import Run
from tests.support.refuses import refuses

GPUS = "trainer.accelerator=gpu and trainer.devices"

SBATCH = "sbatch --nodes=2 --ntasks-per-node=8"
SIZES = {"batch_size": 4, "global_batch_size": 32}


def settings(**trainer: Any) -> DictConfig:
    given = {"accelerator": "gpu", "devices": 8, "num_nodes": 1, **trainer}
    return OmegaConf.create({"trainer": given, "data": {"num_workers": 8, **SIZES}, "norm": {"name": "local"}})


@pytest.mark.parametrize(
    ("gpus", "trainer", "refusal"),
    [
        (0, {}, (GPUS, 8, "torch sees no GPU here; study.dry_run=true lists ")),
        (1, {"devices": 2}, (GPUS, 2, "torch sees 1 GPU here; ")),
        (4, {"accelerator": "cuda"}, (GPUS, 8, "torch sees 4 GPUs here; ", " for a machine that has them")),
        (0, {"devices": "auto"}, (GPUS, "auto", "torch sees no GPU here")),
        (
            8,
            {"num_nodes": 2},
            ("trainer.num_nodes", 2, "a study starts runs on one machine; ", " the same study does the rest"),
        ),
        (8, {}, None),
        (8, {"devices": "auto", "num_nodes": "auto"}, None),
        (0, {"accelerator": "auto"}, None),
    ],
)
def test_what_this_machine_cannot_do_is_refused(
    gpus: int, trainer: dict[str, Any], refusal: tuple[Any, ...] | None
) -> None:
    with refuses(*refusal) if refusal else nullcontext():
        remote.refuse(settings(**trainer), Machine(gpus, cores=2))


def test_how_many_gpus_another_machine_has_must_be_said() -> None:
    with refuses("trainer.devices", "auto", "GPUs of another machine", "; use a number"):
        remote.settle_elsewhere(settings(devices="auto"), Machine(0, cores=2), Path("s"))


@pytest.mark.parametrize(
    ("trainer", "workers", "start"),
    [
        ({}, 8, "python train.py trainer.devices=8 trainer.num_nodes=1 norm=sync "),
        ({"num_nodes": 2}, 8, f"{SBATCH} --gpus-per-node=8 --cpus-per-task=9 slurm/train.sbatch norm=sync "),
        ({"num_nodes": 2, "accelerator": "cpu"}, 0, f"{SBATCH} slurm/train.sbatch norm=sync "),
    ],
)
def test_nodes_and_devices_are_said_once(here: Path, trainer: dict[str, Any], workers: int, start: str) -> None:
    cfg = settings(**trainer)
    cfg.data.num_workers = workers
    overrides = ["trainer.devices=8", f"trainer.num_nodes={cfg.trainer.num_nodes}", "norm=sync"]
    assert remote.command(Run(Plan.of(cfg, here / "s/0"), overrides)) == f"{start}hydra.run.dir=s/0"
