"""What takes nodes away: preemption, and a node that dies."""

from tests.slurm.support.cluster import APART, Cluster
from tests.slurm.support.jobs import check, submit_and_wait
from tests.training.support.train_command import REPO, Run

VICTIM = APART.split(",")[1]


def test_a_job_that_is_preempted_comes_back(cluster: Cluster, straight: Run) -> None:
    """Without --signal: it is told by SIGTERM, which it has to tell from that of scancel."""
    script = cluster.place / "unwarned.sbatch"
    lines = (REPO / "slurm" / "train.sbatch").read_text(encoding="utf-8").splitlines(keepends=True)
    script.write_text("".join(line for line in lines if not line.startswith("#SBATCH --signal")), encoding="utf-8")
    job = submit_and_wait(cluster, script=str(script), apart=True)
    cluster.call("srun", "--partition=high", f"--nodelist={APART}", "--nodes=2", "--ntasks-per-node=4", "true")
    check(cluster.ended(job), straight, restarts=1)


def test_a_job_that_is_warned_of_preemption_comes_back(cluster: Cluster, straight: Run) -> None:
    job = submit_and_wait(cluster, apart=True)
    cluster.call("srun", "--partition=high", f"--nodelist={APART}", "--nodes=2", "--ntasks-per-node=4", "true")
    ended = cluster.ended(job)
    assert f"stopped by SIGUSR1: job {job} is requeued" in ended.log
    check(ended, straight, restarts=1)


def test_a_node_that_dies_takes_the_job_back_to_its_last_checkpoint(cluster: Cluster, straight: Run) -> None:
    job = submit_and_wait(cluster, apart=True)
    cluster.script("kill-node", VICTIM)
    cluster.script("start-node", VICTIM)
    ended = cluster.ended(job)
    assert "it resumes from outputs/slurm-" in ended.log
    check(ended, straight, restarts=1)
