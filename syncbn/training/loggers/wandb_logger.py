"""Where metrics go: a CSV file always, and one W&B run per job, which rank 0 alone opens.

A run that goes on writes on in both. The CSV file is cut back to the checkpoint. W&B's history can only grow: what
it has from earlier attempts is not sent again, and what it lacks, since one was killed, is sent from the CSV file.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from wandb.errors import AuthenticationError, UsageError

from syncbn.training.console import print_line
from syncbn.training.distributed import signals, temporary_directory
from syncbn.training.errors import SettingError
from syncbn.training.loggers import wandb_files, wandb_internals
from syncbn.training.loggers.csv_logger import MetricsFile, read
from syncbn.training.loggers.wandb_journal import Journal, Line
from syncbn.training.run_directory import record

STEP = "trainer/global_step"
EPOCH = "epoch"  # Lightning puts it beside the metrics, into several rows of a step
GONE = wandb_internals.connection_errors()
LATER = "the run is kept offline; upload it later with the command printed at the end"


def build(cfg: DictConfig, run_dir: Path, rank: int) -> list[Logger]:
    """The loggers of one rank.

    Raises:
        SettingError: W&B is asked to be online, and nobody is logged in or the server refuses.
    """
    file = MetricsFile(run_dir)
    if cfg.logger.name != "wandb" or cfg.logger.mode == "disabled":
        return [file]
    if rank != 0:
        return [file, _WandbLogger(None, run_dir, cfg.logger.project)]
    run = _open(cfg, run_dir)
    return [file, _WandbLogger(run, run_dir, cfg.logger.project)]


def position(trainer: pl.Trainer) -> dict[str, int]:
    """How far the metrics have come, as plain data for a checkpoint; empty on ranks other than 0, which write none."""
    files = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
    return {"rows": files[0].rows()} if files and trainer.is_global_zero else {}


def go_on(trainer: pl.Trainer, position: Mapping[str, int]) -> None:
    """Takes the metrics back to where they were when ``position`` was asked for; to be called before training goes on.

    What was logged after that for earlier steps stays: an epoch's metrics, say, come after the checkpoint at its end.
    """
    if not trainer.is_global_zero or "rows" not in position:
        return
    # The logged step is that of optimizer steps, and with several optimizers that of batches.
    step = min(trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1)
    for file in (logger for logger in trainer.loggers if isinstance(logger, MetricsFile)):
        file.cut(position["rows"], step)
    for run in (logger for logger in trainer.loggers if isinstance(logger, _WandbLogger)):
        run.catch_up()


def finish(run_dir: Path, *, failed: bool, preempted: bool = False, summary: dict[str, Any] | None = None) -> None:
    """Closes the W&B run of this process, if it has one; ``preempted`` says that it will go on."""
    if wandb.run is None:
        return
    directory, finished = Path(wandb.run.dir).parent, True
    try:
        wandb.run.summary.update(summary or {})
        if preempted:
            wandb.run.mark_preempting()
        wandb.finish(exit_code=int(failed or preempted))
    except TimeoutError:
        wandb_files.mark_unsent(directory)
    except GONE as error:
        _say_gone(error)
        wandb_files.mark_unsent(directory)
        finished = False
    with suppress(*GONE):
        wandb.teardown()  # waits for W&B's process, which may still be writing
    record.write(run_dir, "wandb", record.read(run_dir, "wandb") | {"finished": finished})


def mark_failed(cfg: DictConfig, run_dir: Path) -> None:
    """Opens the W&B run of a rank 0 that is dead once more, in another process, and closes it as failed.

    Raises:
        SettingError: the server does not answer.
    """
    _init(cfg, run_dir, record.read(run_dir, "wandb").get("mode", str(cfg.logger.mode)))
    finish(run_dir, failed=True)


def _open(cfg: DictConfig, run_dir: Path) -> Any:
    """Opens the W&B run: offline, where the server cannot be reached."""
    asked = mode = str(cfg.logger.mode)
    if asked == "online" and wandb_files.waiting(run_dir):  # a later attempt must not get there first
        mode = "offline"
        _say(f"W&B has not got all of this run's earlier attempts yet: {LATER}")
    try:
        run = _init(cfg, run_dir, mode)
    except _UnreachableError as error:
        mode = "offline"
        _say(f"W&B cannot be reached ({error.hint}): {LATER}")
        wandb.teardown()  # its process would hold on to the run's name
        run = _init(cfg, run_dir, mode)
    about = {"id": run.id, "mode": mode, "asked": asked, "url": run.url if mode == "online" else None}
    record.write(run_dir, "wandb", about | {"finished": False})
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


class _UnreachableError(SettingError):
    """The W&B server does not answer."""


def _init(cfg: DictConfig, run_dir: Path, mode: str) -> Any:
    logger, about = cfg.logger, record.read(run_dir, "run")
    wandb_files.check_names(run_dir)
    batch = about["normalization_batch"]
    tags = [cfg.norm.name, f"world_size={about['world_size']}", f"normalization_batch={batch}"]
    _start_service()
    try:
        return wandb.init(
            id=about["wandb_id"],
            name=about["id"],
            resume="allow",
            mode=mode,  # type: ignore[arg-type]  # checked by the schema
            project=logger.project,
            entity=logger.entity,
            group=logger.group,
            tags=[*tags, *logger.tags],
            dir=run_dir,
            config=OmegaConf.to_container(cfg),  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=logger.init_timeout,
                finish_timeout=logger.finish_timeout,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                git_root=str(Path.cwd()),  # else it runs git in the run directory, which may bring its own .git
            ),
        )
    except (wandb.Error, TimeoutError) as error:
        says = " ".join(str(error).split())
        refused = isinstance(error, AuthenticationError | UsageError) or re.search(r"returned error 4\d\d", says)
        if mode == "online" and not refused:
            raise _UnreachableError("logger.mode", mode, says) from error
        instead = "logger.mode=offline" if mode == "online" else "logger=csv"
        raise SettingError("logger.mode", mode, f"W&B says: {says}; use {instead}") from error


def _start_service() -> None:
    """Starts W&B's process: no signal to all processes of a run ends it, and its sockets are removed with the run's."""
    before = dict(os.environ)
    os.environ.update(temporary_directory.for_sockets())
    try:
        with signals.held():
            wandb.setup(wandb.Settings(silent=True))
    finally:
        os.environ.pop("TMPDIR", None)
        os.environ.update({name: value for name, value in before.items() if name == "TMPDIR"})


class _WandbLogger(WandbLogger):
    """Logs into the run that was opened here, each metric of a step once, whatever earlier attempts have logged.

    Args:
        run: on rank 0, just opened.
    """

    def __init__(self, run: Any, run_dir: Path, project: str) -> None:
        super().__init__(experiment=run, project=project, save_dir=run_dir)
        self._gone, self._caught_up, self._csv = False, False, run_dir / "metrics.csv"
        if run is not None:
            self._directory, self._journal = Path(run.dir).parent.name, Journal(run_dir)
            self._seen, self._number = self._journal.arrived(None if run.offline else run.starting_step)
            if self._number > run.starting_step:  # an offline run does not know where it goes on
                run.log({}, step=self._number, commit=False)

    def catch_up(self) -> None:
        """Logs what the CSV file has and W&B has not."""
        self._caught_up = True
        for row in read(self._csv):
            at = int(row.pop("step"))
            metrics = {name: float(value) for name, value in row.items() if _is_number(value)}
            self.log_metrics(metrics, at)
            self._seen.update((at, name) for name in metrics)  # the row that is being logged is in the file already

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:  # by a user; of no training step, so not to be told apart
            self._number += 1
            self._send(metrics)
            return
        if not self._caught_up:  # training does not go on: it was over when an earlier attempt was killed
            self.catch_up()
        names = [name for name in metrics if (step, name) not in self._seen and name != EPOCH]
        if names:
            self._journal.add(Line(self._directory, self._number, step, names))
            self._number += 1
            self._send({name: metrics[name] for name in metrics if name in names or name == EPOCH}, step)

    def _send(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Without W&B's process training goes on: what it did not get, the next attempt sends from the CSV file."""
        if self._gone:
            return
        try:
            super().log_metrics(metrics, step)
        except GONE as error:
            self._gone = True
            _say_gone(error)

    def finalize(self, status: str) -> None:
        """Leaves the run open: the test comes after the fit, and a failure must be marked as one."""


def _say_gone(error: BaseException) -> None:
    _say(f"W&B's process is gone ({type(error).__name__}: {error}): metrics.csv has everything, W&B what came before")


def _is_number(text: str) -> bool:
    """Also of not-a-number and infinity; a user may have logged what is none."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _say(message: str) -> None:
    print_line(message, error=True)
