"""Logs the tables and plots of a comparison to W&B as one run."""

import shlex
from math import isfinite
from pathlib import Path

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer, tables
from syncbn.study.report.write import flat_frame, plots_in
from syncbn.training.atomic_write import unlinked
from syncbn.training.errors import SettingError


def log_to_wandb(
    comparison: Comparison,
    directory: Path,
    mode: str = "offline",
    *,
    project: str = "syncbn",
    entity: str | None = None,
    group: str | None = None,
    timeout: float = 60,
) -> str:
    """Logs tables and plots to W&B as one run of ``job_type`` "comparison".

    Args:
        comparison: of the report.
        directory: of the report that :func:`syncbn.study.report.write.write` wrote. An offline run is stored there.
        mode: "offline" or "online".
        project: the W&B project; ``entity`` and ``group`` are W&B's too.
        timeout: in seconds, for the start and for the end of the W&B run.

    Returns:
        The address of the run; for an offline run, the command that uploads it.

    Raises:
        SettingError: the mode is unknown, or W&B rejects the run or does not answer in time.
    """
    import wandb  # takes a second, and few reports need it

    from syncbn.training.loggers import wandb_files
    from syncbn.training.run_directory import paths

    wandb_files.check_names(directory)
    if mode not in ("offline", "online"):
        raise SettingError("mode", mode, "use offline or online")
    wandb.setup(wandb.Settings(silent=True))
    try:
        run = wandb.init(
            name=comparison.title,
            job_type="comparison",
            mode=mode,  # type: ignore[arg-type]  # checked above
            project=project,
            entity=entity,
            group=group,
            dir=unlinked(directory / "wandb").parent,
            config={
                "factor": comparison.factor,
                "metric": comparison.metric.name,
                "baseline": comparison.baseline,
                "sides": comparison.sides,
                "margin": comparison.margin if isfinite(comparison.margin) else None,
                "alpha": comparison.alpha,
            },
            settings=wandb.Settings(
                init_timeout=timeout, finish_timeout=timeout, finish_timeout_raises=True, console="off", silent=True
            ),
        )
        frames = {name: flat_frame(getattr(comparison, name)).astype(object) for name in tables.FRAMES}
        run.log(
            {
                f"tables/{name}": wandb.Table(dataframe=frame.where(frame.notna(), None))  # W&B refuses pandas.NA
                for name, frame in frames.items()
                if len(frame)
            }
            | {f"plots/{path.stem}": wandb.Image(str(path)) for path in plots_in(directory / "plots", "png")}
        )
        run.summary.update({"answer": answer.sentence(comparison), "problems": len(comparison.problems)})
        address, place = run.url, Path(run.dir).parent
        run.finish()
    except (wandb.Error, TimeoutError) as error:
        wandb.teardown()
        says = " ".join(str(error).split())
        raise SettingError("mode", mode, f"W&B says: {says}; use mode=offline") from error
    return str(address) if mode == "online" else shlex.join(["wandb", "sync", paths.short(place)])
