"""Keeps one W&B run per job over all resumes; only rank 0 opens it.

Metrics always go to the CSV file too, which a resume cuts back to the checkpoint. W&B's history can only grow: metrics
that it has from earlier attempts are not sent again, and metrics that were lost because an attempt was killed are sent
from the CSV file.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from wandb.errors import AuthenticationError, UsageError

from syncbn.training.console import print_line
from syncbn.training.distributed import signals
from syncbn.training.errors import SettingError
from syncbn.training.loggers import wandb_files, wandb_internals
from syncbn.training.loggers.csv_logger import read
from syncbn.training.loggers.ending import Ending, about_model
from syncbn.training.loggers.wandb_journal import Journal, Line
from syncbn.training.processes import temporary_directory
from syncbn.training.run_directory import record

STEP = "trainer/global_step"
EPOCH = "epoch"  # Lightning adds it to every row, so one step may have it several times
CONNECTION_ERRORS = wandb_internals.connection_errors()
UPLOAD_LATER = "the run is kept offline; upload it later with the command printed at the end"


def build(cfg: DictConfig, run_dir: Path, rank: int) -> "RunLogger":
    """Create the logger of one rank.

    Raises:
        SettingError: W&B is to run online, but there is no API key or the server refuses it.
    """
    run = _open(cfg, run_dir) if rank == 0 else None
    return RunLogger(run, run_dir, str(cfg.logger.project))


def finish(cfg: DictConfig, ending: Ending) -> None:
    """Close the W&B run of this process, if it has one. An interrupted run is marked as one that will be resumed."""
    if wandb.run is None:
        return
    run_dir, directory, finished = ending.run_dir, Path(wandb.run.dir).parent, True
    try:
        _log_files(wandb.run, cfg, ending)
        wandb.run.summary.update(ending.result or {})
        if ending.status == "interrupted":
            wandb.run.mark_preempting()
        wandb.finish(exit_code=int(ending.status != "finished"))
    except TimeoutError:
        wandb_files.mark_unsent(directory)
    except CONNECTION_ERRORS as error:
        _warn_process_ended(error)
        wandb_files.mark_unsent(directory)
        finished = False
    with suppress(*CONNECTION_ERRORS):
        wandb.teardown()  # waits for W&B's process, which may still be writing
    record.write(run_dir, "wandb", record.read(run_dir, "wandb") | {"finished": finished})


def mark_failed(cfg: DictConfig, run_dir: Path) -> None:
    """Reopen the W&B run of a rank 0 that has died, in another process, and close it as failed.

    Raises:
        SettingError: the server does not answer.
    """
    _init(cfg, run_dir, record.read(run_dir, "wandb").get("mode", str(cfg.logger.mode)))
    finish(cfg, Ending(run_dir, "failed"))


def _log_files(run: Any, cfg: DictConfig, ending: Ending) -> None:
    """Log the pictures of the run directory, and the best checkpoint as an artifact if ``logger.log_model`` asks."""
    if cfg.logger.get("pictures") and (pictures := ending.pictures()):
        run.log({f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures})
    checkpoint = ending.checkpoint()
    if cfg.logger.get("log_model") == "best" and checkpoint is not None:
        artifact = wandb.Artifact(f"{run.id}-best", type="model", metadata=about_model(ending, cfg))
        # Without a copy in W&B's directory in the user's home: an offline run is uploaded from the run directory.
        artifact.add_file(str(checkpoint), policy="immutable", skip_cache=True)
        run.log_artifact(artifact, aliases=["best"])


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _open(cfg: DictConfig, run_dir: Path) -> Any:
    """Open the W&B run; offline if the server cannot be reached or earlier attempts are not uploaded."""
    asked = mode = str(cfg.logger.mode)
    if asked == "online" and wandb_files.waiting(run_dir):  # attempts have to be uploaded in their order
        mode = "offline"
        _warn(f"earlier attempts of this run are not uploaded to W&B yet: {UPLOAD_LATER}")
    try:
        run = _init(cfg, run_dir, mode)
    except _UnreachableError as error:
        mode = "offline"
        _warn(f"W&B cannot be reached ({error.hint}): {UPLOAD_LATER}")
        wandb.teardown()  # otherwise W&B's process keeps the run's id in use
        run = _init(cfg, run_dir, mode)
    values = {"id": run.id, "mode": mode, "asked": asked, "url": run.url if mode == "online" else None}
    record.write(run_dir, "wandb", values | {"finished": False})
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


class _UnreachableError(SettingError):
    """The W&B server does not answer."""


def _init(cfg: DictConfig, run_dir: Path, mode: str) -> Any:
    logger, run = cfg.logger, record.read(run_dir, "run")
    wandb_files.check_names(run_dir)
    batch = run["normalization_batch"]
    tags = [cfg.norm.name, f"world_size={run['world_size']}", f"normalization_batch={batch}"]
    _start_service()
    try:
        return wandb.init(
            id=run["wandb_id"],
            name=run["id"],
            resume="allow",
            mode=mode,  # type: ignore[arg-type]  # its range is checked
            project=str(logger.project),
            entity=_text(logger.entity),
            group=_text(logger.group),
            tags=[*tags, *map(str, logger.tags)],
            dir=run_dir,
            config=OmegaConf.to_container(cfg),  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=logger.init_timeout,
                finish_timeout=logger.finish_timeout,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                # Without it W&B runs git in the run directory, whose .git, if it has one, may come from elsewhere.
                git_root=str(Path.cwd()),
            ),
        )
    except (wandb.Error, TimeoutError) as error:
        text = " ".join(str(error).split())
        refused = isinstance(error, AuthenticationError | UsageError) or re.search(r"returned error 4\d\d", text)
        if mode == "online" and not refused:
            raise _UnreachableError("logger.mode", mode, text) from error
        instead = "logger.mode=offline" if mode == "online" else "logger=csv"
        raise SettingError("logger.mode", mode, f"W&B says: {text}; use {instead}") from error


def _start_service() -> None:
    """Start W&B's own process.

    It is started with signals held, so that a signal to all processes of a run does not end it. Its sockets are in the
    temporary directory that is removed with the run's.
    """
    before = dict(os.environ)
    os.environ.update(temporary_directory.for_sockets())
    try:
        with signals.held():
            wandb.setup(wandb.Settings(silent=True))
    finally:
        os.environ.pop("TMPDIR", None)
        os.environ.update({name: value for name, value in before.items() if name == "TMPDIR"})


class RunLogger(WandbLogger):
    """Logs into ``run``, just opened (None on ranks other than 0); each metric of a step once over all attempts."""

    def __init__(self, run: Any, run_dir: Path, project: str) -> None:
        super().__init__(experiment=run, project=project, save_dir=run_dir)
        self._process_ended, self._caught_up, self._csv = False, False, run_dir / "metrics.csv"
        if run is not None:
            self._directory, self._journal = Path(run.dir).parent.name, Journal(run_dir)
            self._seen, self._number = self._journal.arrived(None if run.offline else run.starting_step)
            if self._number > run.starting_step:  # an offline run does not know the last number of earlier attempts
                run.log({}, step=self._number, commit=False)

    def catch_up(self) -> None:
        """Log the metrics that the CSV file has and W&B does not have."""
        self._caught_up = True
        for row in read(self._csv):
            step = int(row.pop("step"))
            metrics = {name: float(value) for name, value in row.items() if _is_number(value)}
            self.log_metrics(metrics, step)
            # Also for W&B's copy of the row that is being logged: the CSV logger comes first, so it is in the file.
            self._seen.update((step, name) for name in metrics)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:  # logged by user code without a step, so duplicates cannot be detected
            self._number += 1
            self._send(metrics)
            return
        if not self._caught_up:  # training had ended when an earlier attempt was killed: no resume has caught up
            self.catch_up()
        names = [name for name in metrics if (step, name) not in self._seen and name != EPOCH]
        if names:
            self._journal.add(Line(self._directory, self._number, step, names))
            self._number += 1
            self._send({name: metrics[name] for name in metrics if name in names or name == EPOCH}, step)

    def _send(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log to W&B. If W&B's process has ended, training continues; the next attempt sends the missing metrics."""
        if self._process_ended:
            return
        try:
            super().log_metrics(metrics, step)
        except CONNECTION_ERRORS as error:
            self._process_ended = True
            _warn_process_ended(error)

    def finalize(self, status: str) -> None:
        """Does nothing: the run stays open for the test after the fit, and :func:`finish` marks failures."""


def _warn_process_ended(error: BaseException) -> None:
    reason = f"{type(error).__name__}: {error}"
    _warn(f"W&B's process has ended ({reason}): metrics.csv has all metrics, W&B has those logged before")


def _is_number(text: str) -> bool:
    """Whether a field is a number, NaN or an infinity; user code may have logged other values."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _warn(message: str) -> None:
    print_line(message, error=True)
