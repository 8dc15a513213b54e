"""Slurm: sets the environment variables of torchrun from those of srun, checks the job's header, and requeues jobs.

Lightning requeues a job from within the signal handler, where it saves a checkpoint. Each rank is at a different point
of its step then, and may wait for ever (Lightning issue 21406). Here all ranks have stopped at the same step and have
written a checkpoint before the job is requeued.
"""

import os
import re
import signal
import subprocess
from functools import cache
from typing import Any

from syncbn.training import program
from syncbn.training.distributed import loopback, signals
from syncbn.training.errors import SettingError

SHELLS = ("bash", "sh", "zsh", "fish", "interactive")  # names that salloc and srun --pty give a job
SPECIAL = 0xFFFFFFFA  # step ids from here on are not srun's: the batch script, an interactive shell
NEARLY_UP = (signal.SIGUSR1, signal.SIGUSR2)  # warnings of the time limit (--signal); submitit uses the second

_held: list[Any] = []  # keeps the store alive as long as rank 0 lives


def is_task() -> bool:
    """Whether srun started this process as a rank; a shell of ``srun --pty`` is not a rank."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < SPECIAL and "SLURM_PTY_PORT" not in os.environ


def is_interactive() -> bool:
    """Whether this is an interactive allocation, in which a person runs many commands; it is never requeued."""
    return os.environ.get("ENVIRONMENT") != "BATCH" and os.environ.get("SLURM_JOB_NAME") in SHELLS


def job() -> str | None:
    """The id of the job, ``ARRAY_TASK`` in an array; None outside Slurm. A requeue keeps it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def check() -> None:
    """Checks the header of the job before any work.

    Raises:
        SettingError: the job has several tasks, but srun did not start this process, so only one would train; or the
            job has a name that Lightning takes for an interactive shell. The hint has the right header.
    """
    if "SLURM_JOB_ID" not in os.environ or is_interactive():
        return
    name = os.environ.get("SLURM_JOB_NAME")
    if name in SHELLS:
        raise SettingError(
            "#SBATCH --job-name",
            name,
            "Lightning and others take a job of this name for an interactive shell; use another, such as #SBATCH "
            "--job-name=syncbn",
        )
    nodes, tasks = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), int(os.environ.get("SLURM_NTASKS", 1))
    if not is_task() and max(nodes, tasks) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise SettingError(
            "Slurm",
            hint=f"this job has {_count(nodes, 'node')} and {_count(tasks, 'task')}, but python was not started by "
            f"srun, so only one process would train; in the script write: srun {program.name()} ...",
        )


def header(nodes: int, devices: int) -> str:
    """The ``#SBATCH`` lines that request this many nodes and tasks."""
    return f"#SBATCH --nodes={nodes} and #SBATCH --ntasks-per-node={devices}"


@cache
def join() -> None:
    """Sets the environment variables that torchrun would set, and starts the store on rank 0.

    Raises:
        SettingError: the nodes have different numbers of tasks, or the store cannot be started.
    """
    tasks = int(_first_set("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    per_node = _tasks_per_node(_first_set("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if len(set(per_node)) > 1:
        raise SettingError(
            "Slurm",
            hint=f"nodes have {', '.join(map(str, per_node))} tasks, and must have as many each; use "
            f"{header(len(per_node), max(per_node))}",
        )
    rank = os.environ["SLURM_PROCID"]
    os.environ |= {"RANK": rank, "LOCAL_RANK": os.environ["SLURM_LOCALID"], "GROUP_RANK": os.environ["SLURM_NODEID"]}
    os.environ |= {"WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(per_node[0])}
    if len(per_node) == 1:
        os.environ.setdefault("MASTER_ADDR", loopback.LOCALHOST)
    os.environ.setdefault("MASTER_ADDR", _first_host())
    os.environ.setdefault("MASTER_PORT", str(_port()))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store below; the process group does not start one
    if rank == "0":
        _held.append(_start_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))


def should_requeue(signum: int) -> bool:
    """Whether a job that this signal has stopped is to be requeued: its time is up, or it is preempted.

    A cancelled job is never requeued, even if it was preempted or its time was up before.

    Raises:
        SettingError: scontrol fails.
    """
    about = _scontrol("show", "job", "--oneliner", _own_id())
    if "JobState=CANCELLED" in about:
        return False
    preempted = re.search(r"\bPreemptTime=(\S+)", about)
    return signum in NEARLY_UP or (preempted is not None and preempted[1] not in ("None", "Unknown"))


def was_requeued() -> bool:
    """Whether Slurm has requeued this job already (``scontrol requeue``, preemption), by its count of restarts.

    Raises:
        SettingError: scontrol fails.
    """
    restarts = re.search(r"\bRestarts=(\d+)", _scontrol("show", "job", "--oneliner", _own_id()))
    return restarts is not None and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def requeue() -> None:
    """Requeues this job. Slurm then ends all its processes, this one included.

    Raises:
        SettingError: Slurm refuses.
    """
    _scontrol("requeue", _own_id())


def _own_id() -> str:
    return job() or ""


def _scontrol(*arguments: str) -> str:
    try:
        # Slurm signals all processes of a job. A signal that asks this rank to stop must not stop scontrol.
        with signals.held():
            done = subprocess.run(
                ["scontrol", *arguments],
                capture_output=True,
                check=True,
                timeout=60,
                encoding="utf-8",
                errors="replace",
            )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise SettingError(
            f"scontrol {' '.join(arguments)}",
            hint=f"{reason}; run it on a machine that has scontrol (a container needs scontrol, slurm.conf and munge's "
            "socket)",
        ) from error
    return done.stdout


def _first_set(*names: str) -> str:
    """The value of the first of these environment variables that is set."""
    found = next((os.environ[name] for name in names if name in os.environ), None)
    if found is None:
        raise SettingError("Slurm", hint=f"srun has set none of {', '.join(names)}; start the ranks with srun")
    return found


def _tasks_per_node(text: str) -> list[int]:
    """Parses Slurm's ``2(x3),1``, which is 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.removesuffix(")") or 1)
    return counts


def _first_host() -> str:
    nodes = _first_set("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        return _scontrol("show", "hostnames", nodes).split()[0]
    except SettingError as error:
        raise SettingError(error.setting, hint=f"{error.hint}; or set MASTER_ADDR to the first of {nodes}") from error


def _port() -> int:
    """A port that all ranks compute alike and that differs between jobs and steps, below the range of client ports."""
    number = 31 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    return 15000 + number % 16000


def _start_store(address: str, port: int) -> Any:
    try:
        return loopback.start_store(address, port)
    except (OSError, RuntimeError) as error:
        raise SettingError(
            "MASTER_PORT",
            port,
            f"rank 0 cannot listen there ({' '.join(str(error).split())[:200]}); set another with export "
            "MASTER_PORT=... in the job script",
        ) from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
