"""Chooses the directories of runs and sweeps, alike in all processes of a run, and shortens paths for output."""

import os
import secrets
from functools import cache
from pathlib import Path
from time import strftime

from syncbn.training.distributed import slurm, store


def run_dir(parent: str, run_id: str | None, ckpt_path: str | None, mode: str = "train") -> str:
    """The directory of a run: that of its id; without an id that of the run that ``ckpt_path`` lies in, or a new one.

    So ``ckpt_path`` alone resumes a run, and ``ckpt_path`` with ``run.id`` begins another run.
    """
    if run_id is not None:
        return str(Path(parent) / str(run_id))
    if mode == "train" and ckpt_path is not None and is_file(Path(ckpt_path)):
        earlier = run_of(Path(ckpt_path))
        if earlier is not None:
            return str(earlier)
    return str(Path(parent) / new_id())


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, even if its ``run.json`` is lost; None outside of run directories.

    For a symbolic link outside of run directories it is the run directory of the target.
    """
    for path in (Path(os.path.normpath(checkpoint.absolute())), real(checkpoint)):
        found = next((d for d in path.parents if (d / "run.json").exists() or _is_run(d, path)), None)
        if found is not None:
            return real(found)
    return None


def real(path: Path) -> Path:
    """Resolves symbolic links like ``Path.resolve``, which raises an error for links in a circle."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL, which no file name can contain
        return path.absolute()


def _is_run(directory: Path, checkpoint: Path) -> bool:
    return checkpoint.parent == directory / "checkpoints" and (directory / "config.yaml").exists()


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for a name that no file can have, for which ``Path.is_file`` may raise."""
    return os.path.isfile(path)  # noqa: PTH113


@cache
def new_id() -> str:
    """A new run id: that of the Slurm job, or date, time and random letters, such as ``20260131-235959-3f9c``.

    A requeue keeps the id of the job, so the job resumes its run. Many runs can start in an interactive allocation, so
    date and time are used there too.
    """
    if slurm.job() and not slurm.is_interactive():
        return f"slurm-{slurm.job()}"
    return store.shared("run_id", lambda: f"{strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", lasting=True)


def sweep_dir(parent: str) -> str:
    """The directory of a sweep, named after the Slurm job array, whose tasks share it, or after date and time."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return str(Path(parent) / (f"slurm-{array}" if array else strftime("%Y%m%d-%H%M%S")))


def short(path: Path, *, resolve: bool = True) -> str:
    """The path relative to the working directory if it lies below it; otherwise the absolute path."""
    path, here = real(path) if resolve else path, Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
