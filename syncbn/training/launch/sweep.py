"""Runs the jobs of a sweep (Hydra's ``-m``) one after the other; the same command again runs only the missing jobs.

Implements ``hydra/launcher=syncbn`` (``hydra_plugins/syncbn_launcher.py``). Every job has its own processes, run
directory and W&B run. The processes are forked from one server that has imported everything
(:mod:`syncbn.training.processes.rank_processes`), so a job starts in about a second. In a Slurm job array
(``slurm/sweep.sbatch``) each task runs one job, whose number is the task's.
"""

import csv
import os
import re
import signal
import socket
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import box
from rich.console import Console
from rich.table import Table

from syncbn.training.atomic_write import replacing, unlinked
from syncbn.training.console import cell, print_line, printable
from syncbn.training.distributed import environment
from syncbn.training.errors import SettingError
from syncbn.training.launch.hydra_internals import is_basic_sweeper
from syncbn.training.launch.job import RunError
from syncbn.training.os_errors import explain
from syncbn.training.processes.rank_processes import Requests
from syncbn.training.read_file import DamagedError, read_text
from syncbn.training.run_directory import lock, record
from syncbn.training.search import objective
from syncbn.training.search.sweeper import FailedJob, is_better, is_fruitless

OBJECTIVE = "value"  # column; "objective" is the setting
ALWAYS = ("job", "status", "test/acc", OBJECTIVE, "best", "error")  # columns that are shown even if all rows are alike
SHOWN_ERROR = 70  # characters of an error in the terminal; sweep.csv has all
_completed: dict[Path, int] = {}  # trials of this process with a value, by sweep directory
_failures: dict[tuple[Path, int], str] = {}  # errors of this process's jobs, by sweep directory and number


def run(launcher: Any, job_overrides: Sequence[Sequence[str]], before: int = 0) -> Sequence[JobReturn]:
    """Runs all jobs in order; in a Slurm job array, only the job whose number is the task's.

    A failed job does not stop the others. A job that has finished is not run again. At the end a table of all jobs of
    the sweep is printed.

    Args:
        launcher: a Hydra launcher after its ``setup``: its ``config``, ``hydra_context`` and ``task_function``.
        job_overrides: the overrides of each job.
        before: number of jobs that a sweeper has had run before, if it does so a few at a time.

    Returns:
        The result of each job. If some jobs failed, the program ends here with a one-line error and exit code 1. A
        sweeper other than Hydra's basic one gets their errors as results instead, since it may continue without them;
        the table of such a search is printed by :func:`end`.
    """
    setup_globals()
    settings = launcher.config.hydra
    configure_log(settings.hydra_logging, settings.verbose)
    sweep_dir = Path(str(settings.sweep.dir))
    sweep_dir.mkdir(parents=True, exist_ok=True)
    again = f"the same sweep with hydra.sweep.dir={sweep_dir} runs the missing jobs"
    jobs = [list(filter_overrides(each)) for each in job_overrides]
    console = Console(soft_wrap=True, highlight=False, quiet=os.environ.get("SLURM_PROCID", "0") != "0")
    results: list[JobReturn] = []
    failed: list[tuple[int, JobReturn]] = []
    searches, stopped = not is_basic_sweeper(str(settings.sweeper._target_)), True
    total = settings.sweeper.get("n_trials") if searches else None
    try:
        numbers, chosen = _begin(settings, jobs, sweep_dir)
    except SettingError as error:
        if not console.quiet:
            print_line(f"error: {error}", error=True)
        raise SystemExit(1) from None
    try:
        with Requests() if environment.launcher() is None else nullcontext() as requests:
            for index in chosen:
                overrides, job = job_overrides[index], jobs[index]
                number = numbers.setdefault(tuple(job), _free(numbers, sweep_dir))
                console.print()
                of = f"trial {before + index + 1} of {total}" if total else f"{index + 1} of {len(jobs)}"
                console.print(cell(f"job {number} ({of}): {' '.join(job)}"))
                results.append(_run(launcher, list(overrides), number, sweep_dir))
                if searches:
                    results[-1] = _trial(results[-1], number, launcher.config)
                if results[-1].status == JobStatus.FAILED:
                    failed.append((number, results[-1]))
                    why = _error(results[-1])
                    if not isinstance(why, SettingError | RunError):  # raised before job.py, which prints its own
                        print_line(f"error: {type(why).__name__}: {' '.join(str(why).split())}", error=True)
                configure_log(settings.hydra_logging, settings.verbose)
                if requests and requests.seen:  # the signal came between two jobs, or after the last step of one
                    print_line(f"error: stopped by {signal.Signals(requests.seen[0]).name}; {again}", error=True)
                    raise SystemExit(128 + requests.seen[0])
        stopped = False
    finally:
        if not console.quiet and (stopped or not searches):
            summarize(sweep_dir, console, _search(launcher.config) if searches else None)
        lock.release(sweep_dir)
    if not failed:
        _completed[sweep_dir] = _completed.get(sweep_dir, 0) + len(results)
        return results
    if searches:  # such a sweeper decides how many jobs may fail
        for number, result in failed:
            _failures[sweep_dir, number] = " ".join(str(_error(result)).split())
            text = f"error: job {number} failed: {_failures[sweep_dir, number]}; {again}"
            result.return_value = CompactHydraException(text)
        _completed[sweep_dir] = _completed.get(sweep_dir, 0) + len(results) - len(failed)
        if total and before + len(jobs) >= total and is_fruitless(settings.sweeper, _completed[sweep_dir]):
            if summarize(sweep_dir, console, _search(launcher.config)):  # Optuna 2.10 raises where no trial has a value
                print_line(f"error: no trial has a value of the objective; {again}", error=True)
            raise SystemExit(1)
        return results
    if not console.quiet:  # printed here, because Hydra prints a traceback for any exception
        numbers_of_failed = ", ".join(str(number) for number, _ in failed)
        print_line(f"error: {len(failed)} of {len(jobs)} jobs failed (job {numbers_of_failed}); {again}", error=True)
    raise SystemExit(1)


def end(config: DictConfig) -> None:
    """Prints the table of a search that has ended, with its best job, and writes it to ``sweep.csv``."""
    sweep_dir = Path(str(config.hydra.sweep.dir))
    if is_basic_sweeper(str(config.hydra.sweeper._target_)) or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    console, search = Console(soft_wrap=True, highlight=False), _search(config)
    if not summarize(sweep_dir, console, search):
        return
    best = best_job([_row(job, number, sweep_dir / str(number), search) for job, number in _numbers(sweep_dir).items()],
                    search)  # fmt: skip
    if best is not None:
        print_line(f"best: job {best['job']}, {search.shown}={best[OBJECTIVE]:.4g}: {sweep_dir / str(best['job'])}")


class Search(NamedTuple):
    """What a search optimizes: the setting ``objective``, its name for people, and whether more is better."""

    objective: str | None
    shown: str
    direction: str


def _search(config: DictConfig) -> Search:
    monitor = OmegaConf.select(config, "callbacks.checkpoint.monitor")
    direction = OmegaConf.select(config, "hydra.sweeper.direction", default="maximize")
    return Search(config.get("objective"), str(config.get("objective") or monitor), str(direction))


def best_job(rows: Sequence[dict[str, Any]], search: Search) -> dict[str, Any] | None:
    """The row of the job with the best objective; None if no job has one."""
    found: dict[str, Any] | None = None
    for row in rows:
        if OBJECTIVE in row and (found is None or is_better(row[OBJECTIVE], found[OBJECTIVE], search.direction)):
            found = row
    return found


def _trial(result: JobReturn, number: int, config: DictConfig) -> JobReturn:
    """The result of a job for a sweeper that searches; without a finite number it is a failure."""
    if result.status == JobStatus.COMPLETED:
        if not (wrong := objective.missing(result.return_value)):
            return result
        error: BaseException | None = SettingError("objective", config.get("objective"), wrong)
        print_line(f"error: {error}", error=True)
    else:
        error = _error(result)
    return FailedJob(overrides=result.overrides, status=JobStatus.FAILED, _return_value=error)


def _begin(settings: Any, jobs: list[list[str]], sweep_dir: Path) -> tuple[dict[tuple[str, ...], int], range]:
    """Locks the sweep directory and finds the jobs that it has.

    Returns:
        The number of each existing job, by its overrides; and the indices of ``jobs`` to run.
    """
    subdir = dict(OmegaConf.to_container(settings.sweep))["subdir"]  # type: ignore[arg-type]  # a DictConfig's is a dict
    if subdir != "${hydra.job.num}":
        raise SettingError("hydra.sweep.subdir", subdir, "leave it out; a job's directory is named by its number")
    if environment.launcher() == "srun" and not is_basic_sweeper(str(settings.sweeper._target_)):
        hint = "a search runs its jobs one after the other; call it in a batch script without srun"
        raise SettingError("hydra/sweeper", settings.runtime.choices.get("hydra/sweeper"), hint)
    if environment.launcher() == "srun":  # no lock: the tasks of an array share the directory, each has its own job
        numbers = _numbers(sweep_dir)
        return numbers, _of_array(jobs, numbers, sweep_dir)
    if environment.launcher() is None:
        try:
            lock.hold(sweep_dir)
        except SettingError as error:
            holder = error.hint.partition(lock.HELD)[0]
            hint = f"{holder} is running this sweep already; wait for it, or use another directory"
            raise SettingError("hydra.sweep.dir", sweep_dir, hint) from None
    return _numbers(sweep_dir), range(len(jobs))


def _free(numbers: dict[tuple[str, ...], int], sweep_dir: Path) -> int:
    """The next unused number. The number of a job whose files cannot be read is used too."""
    return max([-1, *numbers.values(), *(int(job.name) for job in _directories(sweep_dir))]) + 1


def _of_array(jobs: list[list[str]], numbers: dict[tuple[str, ...], int], sweep_dir: Path) -> range:
    """The index of the job that this array task runs: the number of the task."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    array = f"#SBATCH --array=0-{len(jobs) - 1}"
    if task is None:
        raise SettingError("-m", hint=f"under srun one job of a sweep is one task of an array; ask for {array}")
    if int(task) >= len(jobs):
        hint = f"this is task {task}, but the sweep has {len(jobs)} jobs; ask for {array}"
        raise SettingError("#SBATCH --array", hint=hint)
    earlier = {number: job for job, number in numbers.items()}.get(int(task))
    if earlier not in (None, tuple(jobs[int(task)])):
        hint = f"job {task} was {' '.join(earlier)} before and would be {' '.join(jobs[int(task)])} now; "
        hint += "give the same settings in the same order, or another directory"
        raise SettingError("hydra.sweep.dir", sweep_dir, hint)
    numbers[tuple(jobs[int(task)])] = int(task)
    return range(int(task), int(task) + 1)


def _run(launcher: Any, overrides: list[str], number: int, sweep_dir: Path) -> JobReturn:
    """Runs one job. If its directory cannot be created, the job has failed and the sweep continues."""
    try:
        config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        if environment.rank() == 0:  # under srun all ranks run this function
            _write_overrides(sweep_dir / str(number), list(config.hydra.overrides.task))
        return run_job(
            hydra_context=launcher.hydra_context,
            task_function=launcher.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except OSError as error:
        failed = SettingError(f"job {number}", hint=explain(error, sweep_dir / str(number)))
        print_line(f"error: {failed}", error=True)
        result = JobReturn(overrides=overrides, status=JobStatus.FAILED)
        result.return_value = failed
        return result


def _error(result: JobReturn) -> BaseException | None:
    """The exception of a failed job."""
    with redirect_stderr(StringIO()):  # Hydra 1.3 prints the overrides before it raises the error
        try:
            _ = result.return_value
        except Exception as error:
            return error
    return None


def _write_overrides(job: Path, overrides: list[str]) -> None:
    """Writes a job's overrides, by which a repeated sweep finds its number.

    Hydra writes this file too, but not atomically: a kill leaves a part of it.
    """
    path = job / ".hydra" / "overrides.yaml"
    text = yaml.safe_dump(overrides, allow_unicode=True) if overrides else "[]\n"
    with suppress(OSError, DamagedError):
        if read_text(path) == text:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _directories(sweep_dir: Path) -> list[Path]:
    """The directories of jobs, whose names are numbers."""
    return [path for path in sweep_dir.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name)]


def _numbers(sweep_dir: Path) -> dict[tuple[str, ...], int]:
    """The number of each job in this directory, by its overrides."""
    found: dict[tuple[str, ...], int] = {}
    for job in _directories(sweep_dir):
        try:
            settings = yaml.safe_load(read_text(job / ".hydra" / "overrides.yaml"))
        except (OSError, DamagedError, ValueError, RecursionError, yaml.YAMLError):  # killed before it was whole
            settings = None
        if not isinstance(settings, list):  # run.json has the overrides too
            settings = record.read(job, "run").get("overrides")
        if isinstance(settings, list):
            found[tuple(map(str, settings))] = int(job.name)
    return found


def summarize(sweep_dir: Path, console: Console, search: Search | None = None) -> bool:
    """Prints a table of all jobs of a sweep, and writes it to ``sweep.csv`` in its directory; False if it has none.

    The table of a search has the objective of each job, marks the best one, and has the errors of failed jobs.
    """
    rows = [_row(settings, number, sweep_dir / str(number), search) for settings, number in _numbers(sweep_dir).items()]
    if not rows:
        return False
    if search is not None and (best := best_job(rows, search)) is not None:
        best["best"] = "best"
    rows = [
        {printable(name): each if isinstance(each, int | float) else printable(each) for name, each in row.items()}
        for row in rows
    ]
    rows.sort(key=lambda row: int(row["job"]))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    constant = {name for name in columns if len({row[name] for row in rows if name in row}) == 1}
    kept = [name for name in columns if name in ALWAYS or name not in constant]
    table = Table(box=box.HORIZONTALS)
    for name in kept:
        table.add_column(cell(name))
    for row in rows:
        table.add_row(*(cell(_shown(name, row.get(name, ""))) for name in kept))
    if not console.is_terminal:  # in a file or a pipe the table keeps its full width
        console.width = 1000
    console.print()
    console.print(table)
    try:
        _write(rows, columns, sweep_dir)
    except OSError as error:
        print_line(f"error: {explain(error, sweep_dir / 'sweep.csv')}", error=True)
    else:
        console.print(cell(f"{sweep_dir}/sweep.csv"))
    return True


def _write(rows: list[dict[str, Any]], columns: list[str], sweep_dir: Path) -> None:
    draft = sweep_dir / f".sweep-{os.getpid()}-{socket.gethostname()}.csv"  # tasks of an array may write at once
    try:
        with unlinked(draft).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(sweep_dir / "sweep.csv")
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _row(settings: Sequence[str], number: int, run_dir: Path, search: Search | None = None) -> dict[str, Any]:
    result, status = record.read(run_dir, "result"), record.status(run_dir)
    if record.damage(run_dir, "result"):
        result, status = {}, "damaged" if status == "finished" else status
    chosen = dict(map(_name_and_value, settings))
    results = (
        {**result.get("monitored", {}), **result.get("test", {}), "seconds": result.get("seconds")} if result else {}
    )
    row = {"job": number, **chosen, "status": status, **results}
    row |= {"job": number, "status": status}  # a setting or metric of the same name must not replace these
    return row if search is None else row | _trial_columns(run_dir, number, status, search)


def _trial_columns(run_dir: Path, number: int, status: str, search: Search) -> dict[str, Any]:
    """The objective of a job of a search, or its error."""
    if status == "finished":
        with suppress(SettingError, ValueError):
            found = objective.value(run_dir, search.objective)
            if not objective.missing(found):
                return {OBJECTIVE: found}
    error = _failures.get((run_dir.parent, number))
    return {"error": error} if error else {}


def _name_and_value(override: str) -> tuple[str, str]:
    """Parses an override: ``+x='a b'`` is ``x`` and ``a b``, ``~x`` is ``x`` and ``removed``."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError):  # written by another version, or damaged
        name, _, value = override.lstrip("+~").partition("=")
        return name, value
    name = parsed.key_or_group if parsed.package is None else f"{parsed.key_or_group}@{parsed.package}"
    return name, "removed" if parsed.is_delete() else _text(parsed.value())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(key)}: {_text(each)}' for key, each in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _shown(name: str, value: Any) -> str:
    if name == "test/acc" and isinstance(value, float):
        return f"{100 * value:.2f} %"
    if name == "error":
        return str(value) if len(str(value)) <= SHOWN_ERROR else f"{str(value)[:SHOWN_ERROR]} ..."
    if isinstance(value, str) and re.fullmatch(r"-?\d+\.\d{6,}(e-?\d+)?", value):  # drawn by a search
        return f"{float(value):.4g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
