"""A sweep as a job array: each task a job of it, one table, and one that failed done alone."""

import json
import subprocess
import sys

from tests.slurm.support.cluster import Cluster
from tests.training.support.faulty_runs import fault
from tests.training.support.train_command import PROJECT

SWEEP = ("--config-dir", f"{PROJECT}/conf", "norm=local,sync", "seed=0,1", "model=mlp", "trainer.max_epochs=1")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--time=10")


def test_an_array_of_four_is_a_sweep_and_a_task_that_failed_is_done_alone(cluster: Cluster) -> None:
    settings = (*SWEEP, "logger=csv", fault(cluster.place, "fail", batch=2))
    array = cluster.sbatch("slurm/sweep.sbatch", *settings, options=(*ONE_NODE, "--array=0-3"))
    tasks = [f"{array}_{number}" for number in range(4)]
    for task in tasks:
        cluster.ended(task)
    states = [cluster.about(task)["JobState"] for task in tasks]
    assert sorted(states) == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED"], cluster.logs()
    failed = states.index("FAILED")

    directory = cluster.place / f"multirun/slurm-{array}"
    assert sorted(path.parent.name for path in directory.glob("*/run.json")) == list("0123")
    about = [json.loads((directory / f"{number}/run.json").read_text(encoding="utf-8")) for number in range(4)]
    chosen = [set(each["overrides"]) & {"norm=local", "norm=sync", "seed=0", "seed=1"} for each in about]
    assert len(set(map(frozenset, chosen))) == 4
    assert about[failed]["status"] == "failed"

    again = (*settings, f"hydra.sweep.dir=multirun/slurm-{array}")
    job = cluster.sbatch("slurm/sweep.sbatch", *again, options=(*ONE_NODE, f"--array={failed}"))
    ended = cluster.ended(f"{job}_{failed}")
    assert ended.state == "COMPLETED", cluster.logs()
    command = [sys.executable, "-m", "syncbn.cli", "table", str(directory)]
    table = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, encoding="utf-8").stdout
    assert table.count("finished") == 4
