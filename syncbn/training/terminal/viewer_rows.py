"""The commands that show what TensorBoard's and MLflow's loggers wrote, for the table at the end of a run."""

from pathlib import Path

from syncbn.training.loggers.chosen import LOCAL
from syncbn.training.run_directory import record
from syncbn.training.run_directory.paths import short


def rows(run_dir: Path) -> list[tuple[str, str]]:
    """A label and a command for each logger that the run has."""
    found = []
    if (run_dir / "tensorboard.json").exists():
        found.append(("TensorBoard", f"tensorboard --logdir {short(run_dir / 'tensorboard')}"))
    uri = record.read(run_dir, "mlflow").get("tracking_uri")
    if isinstance(uri, str) and uri.startswith(LOCAL):
        shown = f"{LOCAL}{short(Path(uri.removeprefix(LOCAL)))}"
        found.append(("MLflow run", f"mlflow ui --backend-store-uri {shown}"))
    elif isinstance(uri, str):
        found.append(("MLflow run", str(record.read(run_dir, "mlflow").get("run_id"))))
    return found
