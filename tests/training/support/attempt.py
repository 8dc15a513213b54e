"""One attempt at a run, without the training: ``python tests/training/support/attempt.py RUN_DIR SETTINGS``.

Every step logs a line, every fifth one an epoch's end too; a checkpoint is what ``position`` says at some step. With
``tests`` one more comes at the end.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from syncbn.training.config import schema
from syncbn.training.loggers import run_loggers
from syncbn.training.loggers.ending import Ending
from syncbn.training.run_directory import record

ID = "20260131-235959-3f9c"


def attempt(
    run_dir: Path,
    *,
    steps: int = 20,
    save_at: int | None = None,
    killed_at: int | None = None,
    preempted: bool = False,
    tests: bool = False,
    about: dict[str, Any] | None = None,
    loggers: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    begins: bool = False,
    **logger: Any,
) -> None:
    """Resumes from the checkpoint in ``run_dir``, if there is one, to ``steps``, or dies before that."""
    chosen = {"logger": OmegaConf.structured(schema.WandbConfig(**logger))} if loggers is None else {"logger": loggers}
    cfg = OmegaConf.create({"norm": {"name": "sync"}, "callbacks": None, **chosen})
    run_dir.mkdir(exist_ok=True)
    settled = {"id": run_dir.name, "wandb_id": ID, "world_size": 1, "normalization_batch": 4, "goes_on_from": None}
    record.write(run_dir, "run", settled | (about or {}))
    saved = record.read(run_dir, "checkpoint")
    plan: Any = SimpleNamespace(cfg=cfg, run_dir=run_dir)
    trainer: Any = SimpleNamespace(loggers=run_loggers.build(plan, rank=0), is_global_zero=True)
    trainer.global_step = saved.get("step", 0)
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=trainer.global_step - 1))
    if saved and saved["step"] < steps:  # where there is nothing to train, Lightning starts no training
        run_loggers.restore_position(trainer, saved["position"])
    elif begins:
        run_loggers.restore_position(trainer, {"rows": 0})
    for step in range(trainer.global_step, steps):
        log(trainer, {"loss": 1 / (step + 1), "lr": 0.1}, step)
        if step % 5 == 4:
            log(trainer, {"val/acc": step / 100, "epoch": step // 5}, step)
            if step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if step == save_at:
            record.write(run_dir, "checkpoint", {"step": step + 1, "position": run_loggers.position(trainer)})
        if step % 5 == 4:
            log(trainer, {"train/acc": step / 50, "epoch": step // 5}, step)
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
    if tests:
        log(trainer, {"test/acc": 0.5, "epoch": steps // 5}, steps)
        if steps == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
    status = "interrupted" if preempted else "finished"
    run_loggers.finish(cfg, trainer.loggers, Ending(run_dir, status, {"done": steps} | (result or {})))


def log(trainer: Any, metrics: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


if __name__ == "__main__":
    attempt(Path(sys.argv[1]), **json.loads(sys.argv[2]))
