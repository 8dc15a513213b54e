"""The logger for MLflow: one MLflow run per run, continued after a resume; in a local database by default."""

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from syncbn.training.config.compare import flat
from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError
from syncbn.training.loggers import ending as endings
from syncbn.training.loggers.chosen import LOCAL
from syncbn.training.loggers.each_once import EachOnce
from syncbn.training.loggers.ending import Ending, Store
from syncbn.training.run_directory import record

RECORD = "mlflow"  # mlflow.json in the run directory: which MLflow run this is
AT_ONCE = 100  # parameters that MLflow takes in one call
LONGEST = 500  # characters of a parameter
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# MLflow waits minutes for a server that is gone, while the other ranks wait for rank 0.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MLflow(MLFlowLogger, Store):
    """Lightning's logger, which continues the MLflow run of earlier attempts.

    Args:
        plan: of the run.

    Raises:
        SettingError: MLflow refuses the run, or its server does not answer.
    """

    def __init__(self, plan: Plan) -> None:
        settings, run_dir = plan.cfg.logger.mlflow, plan.run_dir
        prepare()
        about = record.read(run_dir, "run")
        uri = _absolute(str(settings.tracking_uri))
        earlier = record.read(run_dir, RECORD)
        run_id = earlier.get("run_id") if earlier.get("tracking_uri") == uri else None
        tags = {"norm": plan.cfg.norm.name, "world_size": about.get("world_size"), "group": settings.group}
        tags |= {"normalization_batch": about.get("normalization_batch"), "run_dir": str(run_dir.resolve())}
        tags |= {str(name): value for name, value in settings.tags.items()}
        try:
            super().__init__(
                experiment_name=str(settings.experiment),
                run_name=about.get("id", run_dir.name),
                tracking_uri=uri,
                tags={name: str(value) for name, value in tags.items() if value is not None},
                artifact_location=_artifacts(uri),
                run_id=_existing(uri, run_id),
            )
            self._run_dir, self._cfg, self._caught_up = run_dir, plan.cfg, False
            self.experiment.update_run(self.run_id, status="RUNNING")
            self._write_record(finished=False)
            self._log_settings()
            self._once = EachOnce(run_dir, self._stored())
        except Exception as error:  # SQLAlchemy's, requests' and MLflow's own have no common class
            raise _refusal(str(settings.tracking_uri), error) from error

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: all settings were logged when the run began."""

    def resume(self, step: int) -> None:
        """Log the metrics that ``metrics.csv`` has and MLflow lacks. It keeps the steps that a resume repeats."""
        self._caught_up = True
        for metrics, at in self._once.lost():
            super().log_metrics(metrics, at)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        new, at = self._once.new(metrics, step)
        if not self._caught_up:  # training had ended when an earlier attempt was killed
            self.resume(at)
        if new:
            super().log_metrics(new, at)

    def finalize(self, status: str = "") -> None:
        """Does nothing: the run stays open for the test after the fit."""

    def end(self, ending: Ending) -> None:
        """Log results, pictures and the checkpoint, and close the run."""
        client, settings = self.experiment, self._cfg.logger.mlflow
        super().log_metrics({f"result/{name}": value for name, value in ending.numbers().items()}, self._once.step)
        if settings.pictures:
            for path in ending.pictures():
                client.log_artifact(self.run_id, str(path), "pictures")
        if (self._run_dir / "config.yaml").is_file():
            client.log_artifact(self.run_id, str(self._run_dir / "config.yaml"))
        if settings.log_model == "best" and (checkpoint := ending.checkpoint()):
            client.log_artifact(self.run_id, str(checkpoint), "checkpoint")
            client.log_dict(self.run_id, endings.about_model(ending, self._cfg), "checkpoint/metadata.json")
        client.set_terminated(self.run_id, STATUS[ending.status])
        self._write_record(finished=True)

    def _write_record(self, *, finished: bool) -> None:
        about = {"tracking_uri": self._tracking_uri, "experiment_id": self.experiment_id, "run_id": self.run_id}
        record.write(self._run_dir, RECORD, about | {"finished": finished})

    def _log_settings(self) -> None:
        """Log all settings as parameters. MLflow's parameters cannot change: a changed one is a tag of its name."""
        from mlflow.entities import Param

        settings = {name: str(value)[:LONGEST] for name, value in flat(OmegaConf.to_container(self._cfg)).items()}
        logged = self.experiment.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in settings.items() if name not in logged]
        for first in range(0, len(new), AT_ONCE):
            self.experiment.log_batch(self.run_id, params=new[first : first + AT_ONCE])
        for name in settings.keys() & logged.keys():
            if settings[name] != logged[name]:
                self.experiment.set_tag(self.run_id, name, settings[name])

    def _stored(self) -> set[tuple[int, str]]:
        client, run_id = self.experiment, self.run_id
        names = client.get_run(run_id).data.metrics
        return {(each.step, name) for name in names for each in client.get_metric_history(run_id, name)}


def prepare() -> None:
    """Set how long MLflow waits for a server, and silence its log lines that need no action."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    import_module("mlflow")  # which sets the level of its log lines
    for name in ("mlflow", "alembic", "lightning.pytorch.loggers.mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def mark(run_dir: Path, status: str) -> None:
    """Close the MLflow run of a rank 0 that has died, from another process."""
    from mlflow.tracking import MlflowClient

    about = record.read(run_dir, RECORD)
    prepare()
    MlflowClient(about["tracking_uri"]).set_terminated(about["run_id"], STATUS[status])
    record.write(run_dir, RECORD, about | {"finished": True})


def _absolute(uri: str) -> str:
    """A local database with its absolute path; its directory is made."""
    if not uri.startswith(LOCAL):
        return uri
    path = Path(uri.removeprefix(LOCAL)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"{LOCAL}{path}"


def _artifacts(uri: str) -> str | None:
    """The directory of artifacts beside a local database; a server has its own place."""
    path = Path(uri.removeprefix(LOCAL))
    return (path.parent / f"{path.stem}-artifacts").as_uri() if uri.startswith(LOCAL) else None


def _existing(uri: str, run_id: str | None) -> str | None:
    """The run of earlier attempts, if nobody has deleted it."""
    if run_id is None:
        return None
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        return run_id if MlflowClient(uri).get_run(run_id).info.lifecycle_stage == "active" else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _refusal(uri: str, error: Exception) -> SettingError:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 200 else f"{reason[:200]} ..."
    return SettingError("logger.mlflow.tracking_uri", uri, f"MLflow says: {reason}; use another place, or logger=csv")
