"""How a stopped run is resumed: the command that the user calls for that, or that Slurm starts the job again."""

import re
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from syncbn.training.distributed import environment, slurm
from syncbn.training.errors import SettingError
from syncbn.training.run_directory import paths, record

_NAMES = ("run.id=", "ckpt_path=", "ckpt_restore=", "hydra.run.dir=")  # overrides that identify the run


def resume_hint(run_dir: Path) -> str:
    """For an error line: the command that resumes this run."""
    if record.read(run_dir, "run").get("tests"):
        return "the same command tests it again"
    if not (run_dir / "checkpoints" / "last.ckpt").exists():
        return "there was no checkpoint yet"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"the same sweep with hydra.sweep.dir={paths.short(run_dir.parent)} resumes it"
    program, *settings = (each for each in sys.argv if not each.startswith(_NAMES))
    settings.append(_run_setting(run_dir))
    if environment.launcher() == "srun":
        return f"resume with: sbatch slurm/train.sbatch {shlex.join(settings)}"
    if environment.launcher() == "torchrun":
        return f"resume with: torchrun ... {shlex.join([program, *settings])}, as before"
    return f"resume with: {shlex.join(['python', program, *settings])}"


def _run_setting(run_dir: Path) -> str:
    """The setting that names this run, ``run.id`` or ``hydra.run.dir``, quoted if Hydra needs it."""
    key, value = "hydra.run.dir", paths.short(run_dir)
    if run_dir.resolve() == Path("outputs", run_dir.name).resolve():
        key, value = "run.id", run_dir.name
    return f"{key}={value}" if re.fullmatch(r"[A-Za-z0-9_./+@-]+", value) else f"{key}='{value}'"


def requeue_message(stop: object) -> str:
    """For an error line: that the job of this run is in Slurm's queue again."""
    return f"{stop}: job {slurm.job()} is requeued and will resume from its last checkpoint"


def is_requeued() -> bool:
    """Whether this process is the batch script of a job that Slurm starts again."""
    if slurm.job() is None or slurm.is_interactive():
        return False
    try:
        return slurm.was_requeued()
    except SettingError:  # no scontrol here
        return False
