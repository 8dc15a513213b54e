"""slurm/train.sbatch on two nodes: one run, that comes back."""

import os
import random
import sys
from pathlib import Path

from syncbn.training import wandb_files
from tests.slurm.cluster import Cluster
from tests.training.command import PROJECT, train
from tests.training.faulty import SETTINGS, differences

SEED = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
ONE_EACH = ("--ntasks-per-node=1", "--time=5")
FAULTY = ("--config-dir", f"{PROJECT}/conf", *SETTINGS, "data.global_batch_size=64", "resume.every_n_steps=7")


def wandb_directories(run_dir: Path) -> list[Path]:
    return wandb_files.directories(run_dir)


def test_two_nodes_are_one_run_with_the_weights_of_torchrun(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("slurm/train.sbatch", *FAULTY, "trainer.max_epochs=1", options=ONE_EACH)
    ended = cluster.ended(job)
    assert ended.state == "COMPLETED", ended.log
    assert (
        "2 nodes of 1 process on the CPU, 32 samples each; norm sync over world: statistics of 64 samples" in ended.log
    )
    run = ended.run()
    about = run.json("run")
    assert (about["id"], about["world_size"], about["status"]) == (f"slurm-{job}", 2, "finished")
    assert len(wandb_directories(run.directory)) == 1
    assert ended.log.count("test accuracy") == 1

    (tmp_path / "torchrun").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    other = train(tmp_path / "torchrun", *FAULTY, "trainer.max_epochs=1", launcher=torchrun)
    assert other.code == 0, other.err
    assert differences(run, other) == []
