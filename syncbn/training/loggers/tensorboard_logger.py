"""The logger for TensorBoard: event files in ``RUN/tensorboard``, which continue after a resume."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from syncbn.training.config.compare import flat
from syncbn.training.config.plan import Plan
from syncbn.training.console import printable
from syncbn.training.loggers.each_once import EachOnce, Points
from syncbn.training.loggers.ending import Ending, Store
from syncbn.training.run_directory import record

FOLDER = "tensorboard"


class TensorBoard(TensorBoardLogger, Store):
    """Lightning's logger, in one directory for all attempts of a run.

    Each row is written to the operating system at once, so a killed process loses none. The events of steps that a
    resume repeats are purged by TensorBoard's own mechanism.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(save_dir=plan.run_dir, name="", version=FOLDER, default_hp_metric=False)
        self._run_dir, self._cfg = plan.run_dir, plan.cfg
        self._once: EachOnce | None = None
        self._session_end: Any = None
        (plan.run_dir / FOLDER).mkdir(exist_ok=True)
        record.write(plan.run_dir, FOLDER, {"finished": False})

    @property
    def log_dir(self) -> str:
        return str(self._run_dir / FOLDER)  # Lightning's expands variables such as $HOME in it

    def resume(self, step: int) -> None:
        """Drop what earlier attempts logged from ``step`` on, and log what they lost before it."""
        earlier = {(at, name) for at, name in _stored(self._run_dir / FOLDER) if at < step}
        if any((self._run_dir / FOLDER).iterdir()):
            self._purge(step)
        self._begin(earlier)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: all settings were logged when the run began."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._once is None:  # training had ended when an earlier attempt was killed
            self._begin(_stored(self._run_dir / FOLDER))
        assert self._once is not None
        self._write(*self._once.new(metrics, step))

    def finalize(self, status: str) -> None:
        """Does nothing: the files stay open for the test after the fit."""

    @rank_zero_only
    def save(self) -> None:
        if self._once is not None:
            self.experiment.flush()

    def end(self, ending: Ending) -> None:
        """Log pictures and the status, and close the files."""
        if self._once is None:
            self._begin(_stored(self._run_dir / FOLDER))
        assert self._once is not None
        if self._cfg.logger.tensorboard.pictures:
            for path in ending.pictures():
                name = f"pictures/{path.stem}"
                self.experiment.add_image(name, _pixels(path), self._once.step, dataformats="HWC")
        self.experiment.add_text("status", ending.status, self._once.step)
        if ending.status == "finished":  # TensorBoard keeps the first end of a session, so a resumed run has only this
            self.experiment.file_writer.add_summary(self._session_end)
        self.experiment.close()
        record.write(self._run_dir, FOLDER, {"finished": True})

    def _begin(self, stored: Points) -> None:
        self._once = EachOnce(self._run_dir, stored)
        settings = OmegaConf.to_container(self._cfg)
        self._begin_session(flat(settings))
        self.experiment.add_text("config", f"```yaml\n{printable_yaml(self._cfg)}\n```", 0)
        for metrics, step in self._once.lost():
            self._write(metrics, step)
        self.experiment.flush()

    def _purge(self, step: int) -> None:
        """Make readers drop the events from ``step`` on, as SummaryWriter does with its argument ``purge_step``.

        Lightning opens the writer when it sets up, before it is known where training resumes.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.experiment.file_writer.add_event(Event(step=step, file_version="brain.Event:2"))
        self.experiment.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        if metrics:
            super().log_metrics(metrics, step)
            self.experiment.flush()

    def _begin_session(self, settings: Mapping[str, Any]) -> None:
        """Write the settings for TensorBoard's page HPARAMS, with the metrics that it shows beside them."""
        from torch.utils.tensorboard.summary import hparams

        shown = {name: each if isinstance(each, bool | int | float) else str(each) for name, each in settings.items()}
        monitor = ((self._cfg.callbacks or {}).get("checkpoint") or {}).get("monitor")
        experiment, start, self._session_end = hparams(
            shown, dict.fromkeys(filter(None, [monitor, "test/acc", "test/loss"]), 0.0)
        )
        for summary in (experiment, start):
            self.experiment.file_writer.add_summary(summary)


def mark(run_dir: Path, status: str) -> None:
    """Log the status of a run whose rank 0 has died, from another process."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run_dir / FOLDER)) as writer:
        writer.add_text("status", status, max((step for step, _ in _stored(run_dir / FOLDER)), default=0))
    record.write(run_dir, FOLDER, {"finished": True})


def printable_yaml(cfg: Any) -> str:
    """The settings as YAML, without characters that are not printable."""
    return "\n".join(map(printable, OmegaConf.to_yaml(cfg).splitlines()))


def _stored(directory: Path) -> Points:
    """The metrics in event files, by step and name. Damaged ends of files are skipped, as TensorBoard skips them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(directory.iterdir()):
        return set()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of events that were purged by intention
    found = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    found.Reload()
    return {(event.step, tag) for tag in found.Tags()["scalars"] for event in found.Scalars(tag)}


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
