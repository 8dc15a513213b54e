"""Checks the directory of a run or a sweep before Hydra creates it, and removes the directory of a refused command.

Hydra creates the directory before it calls the program. So this is a Hydra callback, which Hydra calls before that
(``hydra.callbacks`` in ``conf/hydra/default.yaml``). It does not import torch, so a refused name is reported at once.
"""

import atexit
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training import program
from syncbn.training.composition import full_error
from syncbn.training.config import ranges
from syncbn.training.config.run_id import check_id
from syncbn.training.console import print_line, printable
from syncbn.training.distributed import environment
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain
from syncbn.training.search import sweeper

FILES = 32  # open files that the launcher itself needs; each rank needs more


class CheckDirectories(Callback):
    """Ends the program with a one-line error and exit code 1 if the directory cannot be used, before it is created."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _exit_on_error(_check_run, config)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _exit_on_error(_check_sweep, config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table of a search, whose sweeper has started its jobs a few at a time."""
        from syncbn.training.launch import sweep

        sweep.end(config)


def _exit_on_error(check: Callable[[DictConfig], None], config: DictConfig) -> None:
    """Runs a check and ends the program if it fails.

    Hydra turns an exception in a callback into a warning and continues, so an exception would not stop it.
    """
    try:
        check(config)
        return
    except SettingError as error:
        line, trace = str(error), sys.exc_info()
    except OSError as error:  # a name that no file can have, for example
        line, trace = f"run directory: {explain(error, Path.cwd())}", sys.exc_info()
    except OmegaConfBaseException as error:
        line, trace = str(ranges.unresolved(error)), sys.exc_info()
    if full_error.wanted():
        traceback.print_exception(*trace)
    elif environment.rank() == 0:
        print_line(f"error: {line}", error=True)
    sys.exit(1)


def _check_run(config: DictConfig) -> None:
    run_id = config.run.id
    # Not resolved: an override may be lr=${nothing}, which is refused later, by its name.
    given = OmegaConf.to_container(OmegaConf.select(config, "hydra.overrides.task") or OmegaConf.create([]))
    _check_spelling(run_id, list(map(str, given or ())))
    check_id(run_id)
    _allow_open_files()
    path = _path(config, "hydra.run.dir")
    if config.study is not None:
        if run_id is not None:
            raise SettingError("run.id", run_id, "a study names its runs; use study.directory for another directory")
    elif run_id is not None and path.name != run_id:
        hint = f"these are two runs; leave one out, or end the directory with {run_id}"
        raise SettingError(f"run.id={run_id} and hydra.run.dir", path, hint)
    else:
        _refuse_nested("hydra.run.dir", path)
    _make("hydra.run.dir", path)


def _check_spelling(run_id: str | None, overrides: Sequence[str]) -> None:
    """Refuses an id that Hydra changes: it parses numbers, so that ``1.50`` and ``1.5`` would be the same run."""
    for each in overrides:
        name, _, given = each.partition("=")
        if name == "run.id" and run_id is not None and re.fullmatch(r"[\w.+-]+", given) and given != run_id:
            hint = f"Hydra reads this as {run_id}; put it into quotes (\"run.id='{given}'\"), or use another id"
            raise SettingError("run.id", given, hint)


def _check_sweep(config: DictConfig) -> None:
    if environment.launcher() == "torchrun":
        raise SettingError("-m", hint=f"torchrun starts the ranks of one run, not of a sweep; call {program.name()} -m")
    sweeper.check(config)
    if config.run.id is not None:
        hint = "the jobs of a sweep are named by their numbers; use hydra.sweep.dir"
        raise SettingError("run.id", printable(config.run.id), hint)
    _allow_open_files()
    path = _path(config, "hydra.sweep.dir")
    if (path / "run.json").exists():
        raise SettingError("hydra.sweep.dir", path, "this is the directory of a run; use another for a sweep")
    _refuse_nested("hydra.sweep.dir", path)
    _make("hydra.sweep.dir", path, "multirun.yaml")


def _path(config: DictConfig, name: str) -> Path:
    text = str(OmegaConf.select(config, name))
    # Encoded and decoded again, because letters that the locale lacks are surrogates here, which are not printable.
    if not os.fsencode(text).decode("utf-8", "replace").isprintable():
        raise SettingError(name, printable(text), "it has control characters; leave them out")
    path = Path(text)
    if not text.strip() or Path.cwd().is_relative_to(path.absolute().resolve()):
        raise SettingError(name, text, "a run needs its own directory; use outputs/NAME, for example")
    return path


def _refuse_nested(name: str, path: Path) -> None:
    """Refuses a run directory inside another one, and one that contains other runs."""
    above = next((each for each in path.absolute().parents if (each / "run.json").exists()), None)
    if above is not None:
        raise SettingError(name, path, f"this lies in the directory of another run, {above}; use one outside it")
    if name != "hydra.run.dir" or not path.is_dir() or (path / "run.json").exists():
        return
    inside = next(path.glob("*/run.json"), None)
    if inside is not None:
        raise SettingError(name, path, f"this holds other runs ({inside.parent.name}); use {path}/NAME")


def _make(name: str, path: Path, *left: str) -> None:
    """Creates the directory, and removes it at the exit of the program if it holds nothing but the files ``left``.

    Missing parents are created and removed likewise.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        _remove(missing, ())
        reason = explain(error, path) if isinstance(error, OSError) else f"{printable(path)}: {error}"
        raise SettingError(name, printable(path), f"no directory can be made there ({reason})") from error
    if missing:
        atexit.register(_remove, [each.absolute() for each in missing], left)


def _remove(made: list[Path], left: tuple[str, ...]) -> None:
    """Removes the directories that are empty but for the files named ``left``."""
    with suppress(OSError):
        if made and {each.name for each in made[0].iterdir()} <= set(left):
            for name in left:
                (made[0] / name).unlink(missing_ok=True)
        for each in made:
            each.rmdir()


def _allow_open_files() -> None:
    """Raises the limit of open files to the hard limit; data loader workers share tensors through open files.

    Raises:
        SettingError: the hard limit is too low for a run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft != resource.RLIM_INFINITY and soft < FILES:
        raise SettingError(f"ulimit -n {soft}", hint="too few open files for a run; use at least 64 (ulimit -n 1024)")
