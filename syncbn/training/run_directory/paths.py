"""The names and directories of runs and sweeps: made once for all processes of a run."""

import os
import secrets
from functools import cache
from pathlib import Path
from time import strftime

from syncbn.training.distributed import slurm, store


def run_dir(parent: str, run_id: str | None, ckpt_path: str | None, mode: str = "train") -> str:
    """The directory of a run: by its id; without one the run that ``ckpt_path`` lies in, else a new one.

    So ``ckpt_path`` alone continues a run, and with ``run.id`` it is where another run begins.
    """
    if run_id is not None:
        return str(Path(parent) / str(run_id))
    if mode == "train" and ckpt_path is not None and is_file(Path(ckpt_path)):
        earlier = run_of(Path(ckpt_path))
        if earlier is not None:
            return str(earlier)
    return str(Path(parent) / new_id())


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, also one without ``run.json``.

    Of a symbolic link outside of all runs it is that of the target.
    """
    for path in (Path(os.path.normpath(checkpoint.absolute())), real(checkpoint)):
        found = next((d for d in path.parents if (d / "run.json").exists() or _is_run(d, path)), None)
        if found is not None:
            return real(found)
    return None


def real(path: Path) -> Path:
    """``path`` without symbolic links. ``Path.resolve`` does this too, and raises where links lead in a circle."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL, which no file has in its name
        return path.absolute()


def _is_run(directory: Path, checkpoint: Path) -> bool:
    return checkpoint.parent == directory / "checkpoints" and (directory / "config.yaml").exists()


def is_file(path: Path) -> bool:
    """Whether there is such a file; no for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_link(path: Path) -> bool:
    """Likewise for a symbolic link."""
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """Likewise for a directory."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@cache
def new_id() -> str:
    """That of the Slurm job, which a requeue keeps, else date, time and a few letters: ``20260131-235959-3f9c``.

    An interactive allocation runs many things, so there it is date and time too.
    """
    if slurm.job() and not slurm.is_interactive():
        return f"slurm-{slurm.job()}"
    return store.shared("run_id", lambda: f"{strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", lasting=True)


def sweep_dir(parent: str) -> str:
    """The directory of a sweep: that of the job array, whose tasks share it, else date and time."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return str(Path(parent) / (f"slurm-{array}" if array else strftime("%Y%m%d-%H%M%S")))


def short(path: Path, *, resolve: bool = True) -> str:
    """Relative to the working directory where it lies below it."""
    path, here = real(path) if resolve else path, Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
