"""The subcommands of the program ``syncbn``: ``train``, ``init``, ``doctor``, ``runs``, ``evaluate`` and others.

A subcommand imports its modules when it is called, so that ``--help`` is fast.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

# Only if this is the program: from here on a signal ends the process at once. For ``syncbn``, __main__.py does it.
if __name__ == "__main__":
    from syncbn.training import standard_streams
    from syncbn.training.distributed.signals import end_at_once

    end_at_once()
    standard_streams.outlive_reader()

import typer

app = typer.Typer(
    name="syncbn",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def syncbn() -> None:
    """Distributed training with synchronized batch norm."""


# __main__.py begins it without typer; here it is for the list of subcommands.
@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train a network; "syncbn train --help" explains the settings."""
    from syncbn import train

    sys.argv = ["syncbn", *context.args]
    train.main()


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="A new or empty directory.")],
) -> None:
    """Write a small project: a network, data, settings and a test, to train at once and to change."""
    from syncbn.project.create import create
    from syncbn.training.console import print_line
    from syncbn.training.errors import SettingError

    try:
        lines = create(directory)
    except SettingError as error:
        _fail(error)
    for line in lines:
        print_line(line)


@app.command()
def doctor(
    outputs: Annotated[Path, typer.Option(help="Directory in which run directories would be created.")] = Path(
        "outputs"
    ),
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for the self-test of the layer.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check whether this machine is ready to train, without training; the exit code is 1 if a check FAILED."""
    from rich.console import Console

    from syncbn import doctor
    from syncbn.training.console import print_line
    from syncbn.training.distributed.signals import Interrupted
    from syncbn.training.processes.rank_processes import Requests

    console = Console(highlight=False)
    status = console.status("checking this machine and running the layer on it ...")
    try:
        shown = status if console.is_terminal and not as_json else nullcontext()
        # A signal raises Interrupted, so that the self-test ends its rank processes.
        with Requests() as signals, signals.raising(), shown:
            rows = doctor.examine(outputs, timeout)
    except Interrupted as stop:
        _fail(stop, 128 + stop.signum)
    if as_json:
        for line in doctor.to_json(rows).splitlines():
            print_line(line)
    else:
        doctor.show(rows, console)
    if any(row.status == doctor.Status.failed for row in rows):
        sys.exit(1)


@app.command()
def table(
    directory: Annotated[Path, typer.Argument(help="Directory of the sweep: hydra.sweep.dir, by default multirun/...")],
) -> None:
    """Show all jobs of a sweep, and rewrite its sweep.csv."""
    from rich.console import Console

    from syncbn.training.launch import sweep

    if not sweep.summarize(directory, Console(soft_wrap=True, highlight=False)):
        _fail(f"{directory}: it has no job of a sweep; use the directory that contains 0, 1, ...")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory, or a checkpoint file.")],
    to: Annotated[str, typer.Option(help="onnx, or torch for a program of torch.export (.pt2).")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="The file; by default network.onnx or network.pt2 in the run directory.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="The part of the LightningModule, if it has several networks; '' for all of it.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape of one input, 3,224,224; by default that of the test images.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest accepted difference, as a share of the largest output.")
    ] = 1e-4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of this name.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Call classes that the run's config.yaml names, such as your own network.")
    ] = False,
) -> None:
    """Export the best checkpoint of a run to ONNX or torch.export, and compare the file with the network."""
    from syncbn.inference import export as exporting
    from syncbn.training.console import print_line
    from syncbn.training.errors import SettingError
    from syncbn.training.os_errors import explain

    try:
        exported = exporting.export(
            run, to=to, out=out, part=part, shape=shape, tolerance=tolerance, overwrite=overwrite, trust=trust,
            report=print_line,
        )  # fmt: skip
    except SettingError as error:
        _fail(error)
    except OSError as error:
        _fail(f"--out: {explain(error, out or run)}")
    for line in exporting.lines(exported):
        print_line(line)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, sweep directories, or directories of these.")],
    factor: Annotated[
        str, typer.Option(help="The compared factor: a setting, or a group (norm, data.batch_size).")
    ] = "norm",
    baseline: Annotated[str | None, typer.Option(help="The value to compare with; by default local.")] = None,
    metric: Annotated[str, typer.Option(help="The compared metric, by its name in result.json.")] = "test/acc",
    margin: Annotated[
        float | None, typer.Option(help="Largest difference that counts as equal; by default 0.75 points, or 5 %.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Significance level of the tests.")] = 0.01,
    report: Annotated[
        Path | None, typer.Option(help="Directory of the report; by default compare, next to the runs.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Print the answer, write no report.")] = False,
    details: Annotated[bool, typer.Option("--details", help="Print the tables too that the report has.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Also log the comparison to W&B: offline or online.")] = None,
) -> None:
    """Compare runs that differ in one factor, paired by seed: effect, interval, tests, cost; and write a report."""
    from rich.console import Console

    from syncbn.study.compare import compare as comparing
    from syncbn.study.report import terminal
    from syncbn.training.console import print_line
    from syncbn.training.errors import SettingError

    try:
        if wandb not in (None, "offline", "online"):
            raise SettingError("--wandb", wandb, "use offline or online")
        comparison = comparing.compare(
            runs, factor=factor, baseline=baseline, metric=metric, margin=margin, alpha=alpha
        )
        directory = None if no_report else report or comparing.directory_of_report(runs)
    except SettingError as error:
        _fail(error)
    terminal.show(comparison, Console(highlight=False), details=details)
    if directory is None:
        return
    from syncbn.study.report import wandb_run
    from syncbn.study.report.write import write
    from syncbn.training.os_errors import explain

    try:
        page, here = write(comparison, directory), Path.cwd()
    except OSError as error:
        _fail(f"--report={directory}: {explain(error, directory)}")
    print_line()
    print_line(f"report: {page.relative_to(here) if page.is_relative_to(here) else page}")
    if wandb is not None:
        try:
            print_line(f"W&B: {wandb_run.log_to_wandb(comparison, directory, mode=wandb)}")
        except SettingError as error:
            _fail(f"--wandb: {error}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a report, or one above several.")],
) -> None:
    """Write the pages of reports again, from the tables in them; the runs are not needed."""
    from syncbn.study.runner.rewrite import rewrite
    from syncbn.training.console import print_line
    from syncbn.training.errors import SettingError
    from syncbn.training.os_errors import explain

    try:
        for page in rewrite(directory):
            print_line(str(page))
    except SettingError as error:
        _fail(error)
    except OSError as error:
        _fail(f"DIRECTORY={directory}: {explain(error, directory)}")


@app.command()
def runs(
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="By default outputs, multirun and studies.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="Sort by a metric, setting or field; by default by time.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="In the other order.")] = False,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Only such runs, as status=failed, norm=sync, 'test/acc>0.9'; repeatable."),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metrics instead of the usual ones; repeatable.")] = None,
    columns: Annotated[str | None, typer.Option(help="Only these columns: status,norm,lr,test/acc.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many runs, the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all settings and metrics.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """List runs: status, the settings that differ between them, and metrics."""
    from syncbn.runs.list_runs import Options, list_runs
    from syncbn.training.errors import SettingError

    form = "json" if as_json else "csv" if as_csv else "table"
    options = Options(
        sort=sort, reverse=reverse, filters=filters or (), metrics=metric or (), columns=columns, last=last, form=form
    )
    try:
        list_runs(directories or [], options)
    except SettingError as error:
        _fail(error)


@app.command()
def evaluate(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN... [SETTING=VALUE]...", help="Run directories or checkpoints; settings.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="A data set: digits, or data=folder,data.root=DIR; repeatable. By default the run's own."),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metrics to show; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for all metrics: .csv or .json.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Directory of the tests; by default a new one in outputs.")
    ] = None,
    config_dir: Annotated[Path | None, typer.Option(help="Directory of your own settings, as for train.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Call any class that a run's config.yaml names.")] = False,
) -> None:
    """Test checkpoints on data sets, exactly as mode=test, and show one table."""
    from syncbn.inference.evaluation import data_sets
    from syncbn.inference.evaluation.command import evaluate as evaluating
    from syncbn.inference.evaluation.options import Options
    from syncbn.training.errors import SettingError

    try:
        chosen = [data_sets.parse(each) for each in data or ()]
        evaluating(runs, Options(chosen, metric or (), out, directory, config_dir, trust))
    except SettingError as error:
        _fail(error)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run directory, or a checkpoint file.")],
    folder: Annotated[list[Path] | None, typer.Argument(help="Folders of images, or image files.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write; by default standard output.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes for each image, the most probable first.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that a process computes at once.")] = 64,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one per GPU, or 2 on the CPU.")
    ] = None,
    files_from: Annotated[Path | None, typer.Option(help="Text file with more paths, one on each line.")] = None,
    part: Annotated[
        str | None, typer.Option(help="The part of the LightningModule, if it has several networks; '' for all of it.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Call any class that the run's config.yaml names.")] = False,
) -> None:
    """Write file, class and probability of each image; the exit code is 1 if one cannot be read."""
    from syncbn.inference.prediction.command import predict as predicting
    from syncbn.inference.prediction.options import Options, RankError
    from syncbn.training.distributed.signals import Interrupted
    from syncbn.training.errors import SettingError

    if not folder and files_from is None:
        _fail("FOLDER: name a folder of images, image files, or --files-from=FILE")
    try:
        unreadable = predicting(run, folder or [], Options(out, top, batch_size, devices, files_from, trust, part))
    except (SettingError, RankError) as error:
        _fail(error)
    except Interrupted as stop:
        _fail(f"{stop}; no file was written" if out else stop, 128 + stop.signum)
    if unreadable:
        _fail(f"{unreadable} file{' was' if unreadable == 1 else 's were'} left out: see above")


def _fail(error: object, code: int = 1) -> NoReturn:
    from syncbn.training.console import print_line

    print_line(f"error: {error}", error=True)
    sys.exit(code)


def main() -> None:
    """The entry point."""
    from syncbn.training import standard_streams

    standard_streams.accept_any_text()
    app()


if __name__ == "__main__":
    main()
