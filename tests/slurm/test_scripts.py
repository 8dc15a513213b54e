"""The other scripts: ranks that torchrun starts, and a shell in an allocation."""

import subprocess
import sys

from tests.slurm.support.cluster import APART, Cluster
from tests.slurm.support.jobs import check, submit, submit_and_wait
from tests.training.support.train_command import PROJECT, REPO, Run

TORCHRUN = "slurm/torchrun.sbatch"


def test_torchrun_on_two_nodes_stops_with_a_checkpoint_and_goes_on(cluster: Cluster, straight: Run) -> None:
    cluster.environment["DEVICES"] = "1"
    job = submit_and_wait(cluster, script=TORCHRUN, options=("--cpus-per-task=1",))
    cluster.call("scancel", job)
    ended = cluster.ended(job)
    assert ended.state == "CANCELLED"
    assert f"error: stopped by SIGTERM; resume with: torchrun ... train.py --config-dir {PROJECT}/conf" in ended.log
    assert f" run.id=slurm-{job}, as before" in ended.log
    again = submit(cluster, f"run.id=slurm-{job}", script=TORCHRUN, options=("--cpus-per-task=1",))
    check(cluster.ended(again), straight, restarts=0)


def test_a_shell_in_an_allocation_runs_one_thing_after_another(cluster: Cluster) -> None:
    settings = f"model=mlp trainer.max_epochs=1 logger=csv hydra.run.dir={cluster.place}"
    train = f"srun </dev/null {sys.executable} train.py {settings}"  # srun would read the shell's next lines
    shell = subprocess.run(
        [REPO / "slurm" / "interactive.sh", f"--exclude={APART}", "--nodes=2", "--ntasks-per-node=1"],
        input=f"{train}/one\n{train}/two\n{train}/three trainer.devices=2\nexit 7\n",
        env=cluster.environment | {"SHELL": "/bin/sh", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    assert shell.returncode == 7
    assert shell.stdout.count("2 nodes of 1 process on the CPU") == 2, shell.stderr
    assert shell.stdout.count("test accuracy") == 2
    line = "error: trainer.devices=2: srun started 1; leave it out, or ask for #SBATCH --nodes=2 and #SBATCH "
    assert shell.stderr.count(f"{line}--ntasks-per-node=2\n") == 1
    assert sorted(path.parent.name for path in cluster.place.glob("*/run.json")) == ["one", "two"]
