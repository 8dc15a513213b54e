"""Finds the checkpoint that a path means: a checkpoint file, a run directory, or a directory of runs."""

from collections.abc import Iterator
from pathlib import Path

from syncbn.training.checkpoint import files
from syncbn.training.errors import SettingError
from syncbn.training.run_directory import paths, record

SHOWN = 3  # runs that an error message lists


def located(path: Path) -> tuple[Path, Path | None]:
    """The checkpoint file that ``path`` means, and its run directory; None outside of run directories.

    Of a run directory it is the best checkpoint, or the newest one if the run keeps no best. A directory that holds
    exactly one run means this run.

    Raises:
        SettingError: there is no checkpoint, or the directory holds several runs.
    """
    if not path.is_dir():
        # load() reports a file that does not exist.
        return path, paths.run_of(path) if paths.is_file(path) else None
    found = files.best(path)
    if found is not None:
        return found, path
    if _is_run(path):
        raise SettingError(str(path), hint=_without_checkpoint(path))
    runs = sorted(_runs(path), key=lambda each: each.stat().st_mtime, reverse=True)
    if len(runs) == 1:
        return located(runs[0])
    if not runs:
        raise SettingError(str(path), hint="this is no run directory; use outputs/RUN, or a checkpoint file")
    names = ", ".join(str(each) for each in runs[:SHOWN])
    hint = f"this directory holds {len(runs)} runs; use one of them, the newest are {names}"
    raise SettingError(str(path), hint=hint)


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("run.json", "config.yaml", "checkpoints"))


def _runs(directory: Path) -> Iterator[Path]:
    """The run directories below a directory that have a checkpoint."""
    try:
        yield from (each for each in directory.iterdir() if each.is_dir() and files.best(each) is not None)
    except OSError as error:
        raise SettingError(str(directory), hint=f"it cannot be read ({error.strerror})") from error


def _without_checkpoint(run_dir: Path) -> str:
    tested = record.read(run_dir, "run").get("tests")
    if isinstance(tested, str):
        return f"this run only tested a checkpoint, and has none; use that one: {tested}"
    status = record.status(run_dir)
    return (
        f"this run has no checkpoint (its status is {status}); train it until the end of an epoch, or use another run"
    )
