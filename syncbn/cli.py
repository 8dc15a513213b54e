"""The command ``syncbn``. A subcommand imports what it needs when it is called, so that ``--help`` need not wait."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" or Path(sys.argv[0]).name == "syncbn":  # the program: a signal ends it from here on
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


@app.command()
def doctor(
    outputs: Annotated[Path, typer.Option(help="Where run directories would be made.")] = Path("outputs"),
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for the self-test of the layer.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine for training, without training; the exit code is 1 if a check FAILED."""
    from rich.console import Console

    from syncbn import doctor
    from syncbn.training.console import print_line
    from syncbn.training.distributed.rank_processes import Requests
    from syncbn.training.distributed.signals import Interrupted

    console = Console(highlight=False)
    status = console.status("looking at this machine, and running the layer on it ...")
    try:
        shown = status if console.is_terminal and not as_json else nullcontext()
        with Requests() as signals, signals.raising(), shown:  # the ranks of the self-test are to be ended
            rows = doctor.examine(outputs, timeout)
    except Interrupted as stop:
        print_line(f"error: {stop}", error=True)
        sys.exit(128 + stop.signum)
    if as_json:
        for line in doctor.to_json(rows).splitlines():
            print_line(line)
    else:
        doctor.show(rows, console)
    if any(row.status == doctor.Status.failed for row in rows):
        sys.exit(1)


@app.command()
def table(
    directory: Annotated[Path, typer.Argument(help="Of the sweep: hydra.sweep.dir, multirun/... if not said.")],
) -> None:
    """Show all jobs of a sweep, and write them to its sweep.csv anew."""
    from rich.console import Console

    from syncbn.training.console import print_line
    from syncbn.training.launch import sweep

    if not sweep.summarize(directory, Console(soft_wrap=True, highlight=False)):
        print_line(
            f"error: {directory}: there is no job of a sweep in it; give the directory that has 0, 1, ...", error=True
        )
        sys.exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, sweeps' directories, directories of these.")],
    factor: Annotated[
        str, typer.Option(help="What is compared: a setting, or a group (norm, data.batch_size).")
    ] = "norm",
    baseline: Annotated[str | None, typer.Option(help="The side to compare with; local, if not said.")] = None,
    metric: Annotated[str, typer.Option(help="By what, as result.json names it.")] = "test/acc",
    margin: Annotated[float | None, typer.Option(help="What is no difference yet; 0.75 points, or 5 %.")] = None,
    alpha: Annotated[float, typer.Option(help="Level of the tests.")] = 0.01,
    report: Annotated[Path | None, typer.Option(help="Directory of the report; compare beside the runs.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="The tables here, and no report.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Log it to W&B too: offline or online.")] = None,
) -> None:
    """Compare runs that differ in one factor, over pairs of one seed: effect, interval, tests, cost; and a report."""
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
        print_line(f"error: {error}", error=True)
        sys.exit(1)
    terminal.show(comparison, Console(highlight=False))
    if directory is None:
        return
    from syncbn.study.report import wandb_run
    from syncbn.study.report.write import write
    from syncbn.training.os_errors import explain

    try:
        page, here = write(comparison, directory), Path.cwd()
    except OSError as error:
        print_line(f"error: --report={directory}: {explain(error, directory)}", error=True)
        sys.exit(1)
    print_line()
    print_line(f"report: {page.relative_to(here) if page.is_relative_to(here) else page}")
    if wandb is not None:
        try:
            print_line(f"W&B: {wandb_run.log_to_wandb(comparison, directory, mode=wandb)}")
        except SettingError as error:
            print_line(f"error: --wandb: {error}", error=True)
            sys.exit(1)


def main() -> None:
    """The entry point."""
    from syncbn.training import standard_streams

    standard_streams.accept_any_text()
    app()


if __name__ == "__main__":
    main()
