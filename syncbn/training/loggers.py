"""Where metrics go: a CSV file always, and one W&B run per job, which rank 0 alone opens."""

from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from syncbn.training import record
from syncbn.training.config import SettingError


def build(cfg: DictConfig, run_dir: Path, rank: int) -> list[Logger]:
    """The loggers of one rank.

    Raises:
        SettingError: W&B is asked to be online and the server does not answer in time.
    """
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="")]
    if cfg.logger.name == "wandb" and cfg.logger.mode != "disabled":
        run = _open(cfg, run_dir) if rank == 0 else None
        loggers.append(_WandbLogger(experiment=run, project=cfg.logger.project, save_dir=run_dir))
    return loggers


def finish(run_dir: Path, *, failed: bool, summary: dict[str, Any] | None = None) -> None:
    """Closes the W&B run of this process, if it has one."""
    if wandb.run is None:
        return
    wandb.run.summary.update(summary or {})
    wandb.finish(exit_code=int(failed))
    record.write(run_dir, "wandb", record.read(run_dir, "wandb") | {"finished": True})


def mark_failed(cfg: DictConfig, run_dir: Path) -> None:
    """Opens the W&B run of a rank 0 that is dead once more, in another process, and closes it as failed."""
    _open(cfg, run_dir)
    finish(run_dir, failed=True)


def _open(cfg: DictConfig, run_dir: Path) -> Any:
    logger, about = cfg.logger, record.read(run_dir, "run")
    batch = about["normalization_batch"]
    tags = [cfg.norm.name, f"world_size={about['world_size']}", f"normalization_batch={batch}"]
    try:
        run = wandb.init(
            id=about["wandb_id"],
            resume="allow",
            mode=str(logger.mode),  # type: ignore[arg-type]  # checked by the schema
            project=logger.project,
            entity=logger.entity,
            group=logger.group,
            tags=[*tags, *logger.tags],
            dir=run_dir,
            config=OmegaConf.to_container(cfg),  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=logger.init_timeout,
                finish_timeout=logger.finish_timeout,
                finish_timeout_raises=False,
                console="off",
                silent=True,
            ),
        )
    except (wandb.Error, TimeoutError) as error:
        says = " ".join(str(error).split())
        raise SettingError(f"logger.mode={logger.mode}: W&B says: {says}; use logger.mode=offline") from error
    url = run.url if logger.mode == "online" else None
    record.write(
        run_dir,
        "wandb",
        {"id": run.id, "mode": str(logger.mode), "url": url, "finished": False},
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


class _WandbLogger(WandbLogger):
    """Logs into the run that was opened here, whose end is this module's business."""

    def finalize(self, status: str) -> None:
        """Leaves the run open: the test comes after the fit, and a failure must be marked as one."""
